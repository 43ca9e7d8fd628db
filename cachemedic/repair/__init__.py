"""Trained operators that repair what attention reads.

From the bottom up:

inward_clamp  a clamp with a gradient at its bounds
config        what defines an operator
registry      the families by name
operator      what every family shares
folded        the families A, B and C
attach        attaches an operator to the attention of a model (`protect`)
"""

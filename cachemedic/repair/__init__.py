"""Trained operators that repair what attention reads.

From the bottom up:

inward_clamp  a clamp with a gradient at its bounds
config        what defines an operator
operator      what every family shares, and the registry of families
folded        the families A, B and C
attach        attaches an operator to the attention of a model (`protect`)
"""

"""Trained operators that repair what attention reads.

From the bottom up:

inward_clamp  a clamp with a gradient at its bounds
config        what defines an operator
attention     what repair inside attention is given, and what it offers
attach        attaches an operator to the attention of a model (`protect`)
registry      the families by name
shipped       the trained operators that come with the package
weights/      these operators
trainable     what training asks of a family
operator      what every family shares
gram          identity loss and contraction ratio from Gram matrices
folded        the families A, B and C
"""

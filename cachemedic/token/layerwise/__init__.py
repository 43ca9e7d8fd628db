"""The first edition of families D and E, which codes a token layer by layer.

One model of the whole token does better and replaces it. The notebooks and the committed results still measure this
code.

From the bottom up:

options         what the options of D and E may be
token_vectors   one vector per token and layer: heads joined, keys unrotated
transform       how the vector of a layer follows from the layer below, and the axes of what does not: the innovation
sketch_code     the code of a token, layer by layer
learned_basis   axes of the innovation that are learned
token_prior     what the token ids alone say: the keys and values of the lowest layers
prior_alone     the rival that looks at token ids only
observation     a stored cache as it is read
depth_filter    one layer: how much of a damaged token to believe, and what it was
statistics_files  the files of a calibrated operator
operator        the families D and E: the walk through the layers
suspects        which tokens of a stored cache a scrub has to look at
rewrite         the quick repair: damaged tokens written anew from their codes
scrub           the repair of a whole stored cache
augmented       attention reads a cache with its repair, where it may not be written back
token_record    what a cache remembers of its tokens, written as they are
sketch_cache    the Hugging Face cache that is written, kept and scrubbed so
forward_call    tells that cache the ids and positions of each forward pass
calibration     the transform of a base, measured on clean caches
"""

LAYERWISE = "layerwise-"  # what the names of its families begin with

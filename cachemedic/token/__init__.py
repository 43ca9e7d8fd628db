"""One model of a whole token over all layers at once, a short code of it, and what repairs a token with both.

Of the second edition, from the bottom up:

dense         refuses models and caches whose tokens cannot be computed again
vectors       one vector a token: keys (unrotated) and values of all layers and heads
lowest_layer  what the token ids tell exactly: the keys and values of the lowest layer
recompute     damaged tokens computed again from their ids
hashes        which tokens and layers of a cache changed since they were written
damage_kinds  what kind of damage a changed token shows
check         the report of damaged tokens, layers and kinds

Of the first edition, which codes layer by layer, from the bottom up:

options         what the options of D and E may be
token_vectors   one vector per token and layer: heads joined, keys unrotated
transform       how the vector of a layer follows from the layer below, and the axes of what does not: the innovation
scalar_codes    few-bit codes of real numbers, their allotment and packing
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

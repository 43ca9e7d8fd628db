"""One model of a whole token over all layers at once, a short code of it, and what repairs a token with both.

Of the second edition, from the bottom up:

dense         refuses models and caches whose tokens cannot be computed again
vectors       one vector a token: keys (unrotated) and values of all layers and heads
lowest_layer  what the token ids tell exactly: the keys and values of the lowest layer
recompute     damaged tokens computed again from their ids
hashes        which tokens and layers of a cache changed since they were written
damage_kinds  what kind of damage a changed token shows
check         the report of damaged tokens, layers and kinds

layerwise/: the first edition's code, layer by layer, which the notebooks still measure.
"""

"""Families D and E. From the bottom up:

token_vectors   one vector per token and layer: heads joined, keys unrotated
transform       how the vector of a layer follows from the layer below, and the axes of what does not: the innovation
scalar_codes    few-bit codes of real numbers, their allotment and packing
sketch_code     the code of a token, layer by layer
observation     a stored cache as it is read
depth_filter    one layer: how much of a damaged token to believe, and what it was
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

"""One model of a whole token over all layers at once, a short code of it, and what repairs a token with both.

New, from the bottom up:

vectors            one vector x [B, T, D] a token: keys (unrotated) and values of all protected layers and heads
lowest_layer       what the token ids tell exactly: the keys and values of the lowest layer
joint              `JointModel`: x = mean + c axes / scale + rest; its file; the prior of c from the ids
code               `TokenCode`: c minus its prior in few bits a coordinate, packed bytes a token
joint_calibration  `fit_joint_model`: the model of a base from strings; `calibrate` for an operator
estimate           the conditional mean of damaged tokens from code, ids and what is left of them
joint_operator     the families D and E that hold a joint model

Signatures on which others build:

    vectors = TokenVectors(model, layers=None)                # a Hugging Face model; None: all layers
    x = vectors.of(keys, values, positions)                   # [B, L, G, T, d] each, or a list by layer -> [B, T, D]
    keys, values = vectors.back(x, positions)                 # [B, L, G, T, d] each
    joint = JointModel.from_file(path); joint.save(path); joint.dim, .coordinates, .sinks, .fixed_bytes, .digest
    prior = joint.prior(model, ids, positions)                # Prior(mean [B, T, m], lowest [B, T, W])
    code = TokenCode(joint, share=1 / 128, with_ids=True); code.bytes_per_token
    packed = code.encode(x, prior)                            # uint8 [B, T, bytes_per_token]
    c = code.decode(packed, prior)                            # [B, T, n], the first n coordinates
    x = joint.reconstruct(c, prior)                           # prior (or None): the lowest layer is exact with it

Tokens at positions below `joint.sinks` are not described by the model: a cache keeps them as they are.

Of the first edition, to be replaced, from the bottom up:

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

"""One model of a whole token over all layers at once, a short code of it, and what checks and repairs tokens with both.

From the bottom up:

dense              which models and caches have tokens that can be looked at one by one
scratch            memory that is written again and again
vectors            one vector a token: keys (unrotated) and values of all layers and heads
lowest_layer       what the token ids tell exactly: the keys and values of the lowest layer
block_attention    attention of scattered tokens that does not read far ahead
recompute          damaged tokens computed again from their ids
hashes             which tokens and layers of a cache changed since they were written
scalar_codes       few-bit codes of real numbers
joint, joint_files the joint model of a token, and its file
prior_fit, principal_axes  what it holds of the ids, and of what they leave
joint_calibration, calibration_text  how it is measured, and on which text
code               the code of a token under the joint model
parts, rounded, estimate  what damaged tokens most likely held; of numbers that were rounded, within bounds
shared_rotation    a rotation that many of them share, undone before
trust              the network that says how much of a damaged token to believe
first_token        the very first token, which the joint model leaves out, and what it tells of weights
kept               what family E keeps of the tokens of a cache
token_repair, token_recompute  operators that repair stored tokens, recomputation from ids or kept states: as defenses
trust_fit          the first training of the trust network, and what that asks of a family
joint_operator     the families D and E
joint_calibrate    makes an operator of D or E useful (`calibrate`)
plausible          whether tokens follow from their ids (`check_cache`)
record             what a cache remembers of its tokens
damage_kinds, check, repair_report  the reports
recorded_cache     a cache with a record of its tokens
coder, costs, policy, ways  how damaged tokens are repaired, and by which way
forward_hook, storage, cache, cache_files, given, look_after  `SketchCache`, its files, and caches from elsewhere
"""

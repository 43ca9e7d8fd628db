"""Valence-weighted distillation, a second objective for the same students.

From the bottom up:

weights     how much each sequence counts
saliency    what the weights are computed from
terms       soft, feature, sequence and future terms
head        the valence head: from hidden states to numbers in [0, 1]
objective   the whole objective
rollouts    the student's own continuations
step        what the objective sees of a training step
gate        the mercy gate: takes an update back that lowers valence
projection  the projected valence that the gate asks for
quantiser   learned step sizes of a quantised cache
"""

"""Trains operators by self-distillation of the frozen model.

From the bottom up:

step_data     the plain data of one training step
objective     the repair objective
bank          clean caches and teacher logits, computed once
config        what defines a training
draws         the samples and faults of a step
student       the student's forward pass from the first corrupted layer on
stored_repair training of operators that repair stored tokens
keep_best     the best parameters of each run by validation
forward       one training step
run_adam      Adam for a stack of runs
log           the training log
trainer       the loop; resumes where it was
kept_operators  trained operators, by the key of their configuration
valence/      valence-weighted distillation
"""

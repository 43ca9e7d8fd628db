"""Scores every reader of a damaged cache on the same examples and the same damage.

From the bottom up:

statistics            intervals over seeds and examples
detection             AUROC of damaged tokens
bounds                what linear maps can do at best
decoding              the clean pass of a task, and decoding over any cache
evaluate              scores of all readers under one condition
answers               what a model answers behind a damaged cache
severity_calibration  measures the severity map
experiments           grids of conditions that resume where they were
repair_quality        the error that a defense leaves in the cache, and its contraction ratio
stability             logit sensitivity and amplification maps
"""

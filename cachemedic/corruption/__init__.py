"""What can happen to a stored cache.
A specification is drawn into an event for each sample, and an event is applied to tensors or to a Hugging Face cache.

From the bottom up:

types           the six corruption types of the threat model, one rule each
storage_faults  flipped bits, pages of another request, lossy quantisation
severity        looks up the parameter of a severity in the calibrated map
spec            the specification, and the event drawn from it
apply           corrupts tensors and caches; the mixture that operators train on
incidents       what users report, as damage to whole caches
"""

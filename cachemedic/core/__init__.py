"""Plain tools that know nothing of language models.

From the bottom up:

files       files that are written whole or not at all, carry their hash and are checked when they are read
tensors     tensors in such a file
errors      errors for names that do not exist
integers    whole numbers of any kind, as plain ones
seeds       random generators that are seeded by a name
divergence  how far repaired caches and logits are from the clean ones
"""

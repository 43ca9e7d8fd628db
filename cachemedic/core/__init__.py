"""Plain tools that know nothing of language models.

From the bottom up:

files       files that are written whole or not at all
errors      errors for names that do not exist
seeds       random generators that are seeded by a name
divergence  how far repaired caches and logits are from the clean ones
"""

"""Plain tools that know nothing of language models.

From the bottom up:

files       files that are written whole or not at all, carry their hash and are checked when they are read
tensors     tensors in such a file
errors      errors for names that do not exist
registry    things by name, to which any module can add its own
integers    whole numbers of any kind, as plain ones
seeds       random generators that are seeded by a name
severity_map  a table from severities to the parameters of corruption types
divergence  how far repaired caches and logits are from the clean ones
"""

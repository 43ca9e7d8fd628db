"""Plain tools that know nothing of language models.

From the bottom up:

cache_folder  where this machine keeps what takes long to make
files       files that are written whole or not at all, carry their hash and are checked when they are read
tensors     tensors in such a file
errors      errors for names that do not exist
hub         whether the Hugging Face hub can answer
integers    whole numbers of any kind, as plain ones
keys_values  what most of this package passes on: two tensors of one shape
quantise    uniform quantisation: numbers as they are read back from few bits
progress    progress bars
registry    things by name, to which any module can add its own
seeds       random generators that are seeded by a name
threads     one thread, or several of one each, for what is kept, so that it does not depend on the machine
severity_map  a table from severities to the parameters of corruption types
divergence  how far repaired caches and logits are from the clean ones
"""

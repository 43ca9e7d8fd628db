"""What can be done about a damaged cache without training.

From the bottom up:

safeguards    the interface of defences that keep something when a cache is written
clean_ranges  what clean keys and values look like
heuristics    blind defences, oracles and references
ecc           error correction of memory words, and checksums
shadows       coarse second copies behind checksums
rivals        all defences of this kind by name
"""

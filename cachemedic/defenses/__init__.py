"""What can be done about a damaged cache without training.

From the bottom up:

defense           the interface of every defense, trained ones included
clean_ranges      what clean keys and values look like
registry          defenses by name, to which any module can add its own
heuristics        blind defenses, oracles and references
ecc               error correction of memory words, and checksums
golay             error correction of three bits in 24
shadows           coarse second copies behind checksums
memory_codes      the codes of both as defenses
storage_defenses  error correction, checksums and copies by name
by_name           any defense by name, those of this package included
"""

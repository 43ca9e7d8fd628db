"""Benchmarks (`make bench`): what folded repair costs a decoding step, and how fast a sweep of operators trains."""

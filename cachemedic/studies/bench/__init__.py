"""Benchmarks (`make bench`): what folded repair costs a decoding step, how fast a sweep of operators trains, and what
check and repair of whole tokens cost.

From the bottom up:

timing, memory          how time and memory are measured
random_operator         operators of random numbers, which do as much work as real ones
materialised, materialised_training  repair and training the plain way, as references
decode                  a decoding step with operators inside attention
readers                 a decoding step with every reader of a cache
training                a sweep of operators
whole_tokens            write, check and repair of a `SketchCache`
measure                 all of them, into results/
"""

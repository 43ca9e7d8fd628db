"""The experiments behind the notebooks, and what draws, checks and reports their results.
Nothing else in the package uses this room.

From the bottom up:

pretraining/   how the embedded bases were made
bench/         benchmarks
result_files   reading a CSV, which its sidecar knows by its hash
run            a run: its parameters and folders, and CSVs that say what they were made from
summaries      scores, recoveries and intervals of a grid; it needs no torch
sweeps         conditions by name, and their training
setting        the base, the operators and the grids that studies share
...            what single studies measure
computing/     the studies: what each notebook computes
drawing/       figures and tables, from data frames alone
report         a run that saves figures and tables: what a notebook makes
verify         checks committed results
paper_numbers  the numbers of the paper
"""

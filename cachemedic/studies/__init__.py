"""The experiments behind the notebooks, and what draws, checks and reports their results.
Nothing else in the package uses this room.

From the bottom up:

pretraining/   how the embedded bases were made
bench/         benchmarks
report         results as CSV with sidecars, figures, tables
...            one module or more for each notebook
verify         checks committed results
paper_numbers  the numbers of the paper
"""

"""The experiments behind the notebooks, and what draws, checks and reports their results.
Nothing else in the package uses this room.

From the bottom up:

pretraining/   how the embedded bases were made
bench/         benchmarks
result_files   reading a CSV, which its sidecar knows by its hash
jobs           jobs on a cluster, by submitit
run            a run: its parameters and folders, and CSVs that say what they were made from
summaries      scores, recoveries and intervals of a grid; it needs no torch
sweeps         conditions by name, and their training
setting        the base, the operators and the grids that studies share
base_report    what is known of a base model
contraction    how far an operator contracts the error
main_study     the main results on one base
family_study   how the families are trained that are compared
family_evaluation  and how they are compared
fault_grid     every defense at every parameter of every fault
quantised_evaluation  language modelling on a cache of few bits
second_model   the main result on any base and any text
pretrained     the operators, texts and conditions of the studies of a pretrained model
real_text      how well a base reads text from outside
measured_valence  valence behind a damaged cache, and of what is written there
valence_report what the valence experiments report
gate_report    what the mercy gate did, cost and kept
computing/     the studies: what each notebook computes
drawing/       figures and tables, from data frames alone
report         a run that saves figures and tables: what a notebook makes
committed      results as the last commit holds them
compare        results of now beside those of the last commit
verify_sample  what a sample of committed rows is
verify_samples, verify_sweep_samples  the samples
verify         checks committed results
playground     what the notebook of that name shows
ship_operators makes the operators that come with the package
paper_numbers  the numbers of the paper
"""

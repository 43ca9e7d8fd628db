"""What each notebook computes, a module each: NN_NAME.ipynb shows the study NAME.
`results(run)` returns its CSVs by name; conditions and sizes of the experiment stand here and nowhere else.
"""

"""Plain tools that know nothing of models.

From the bottom up:

files    files that are written whole or not at all
errors   errors for names that do not exist
"""

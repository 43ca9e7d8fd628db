"""Figures and tables, from the CSVs alone: nothing here computes, so that to edit it makes no result stale.

From the bottom up: style, readers, tables, then figures and tables by subject.
"""

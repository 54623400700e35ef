"""Grids of runs of train.py: run to the end, and told in one table."""

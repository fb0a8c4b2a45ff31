"""Grids of runs: which there are, what is done of them, and their table."""

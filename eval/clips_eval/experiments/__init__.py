"""Grids of runs: ablations and the tower swap."""

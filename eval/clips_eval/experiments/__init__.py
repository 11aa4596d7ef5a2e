"""Grids of runs: ablations of captions and objectives, and the comparison of vision towers."""

"""Intervals, paired tests, provenance, result files."""

"""Intervals, paired tests, provenance, JSON files."""

"""Shared by the tests: tiny models and data sets, processes, servers."""

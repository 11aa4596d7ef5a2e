"""Shared by all packages: errors of one line, files written whole, strict recipes, which process this is."""

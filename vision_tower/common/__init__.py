"""Shared by all packages: user errors, logging, atomic file writes, strict recipes, ranks."""

"""Captions, the CLIPS token layout, and which text each objective reads."""

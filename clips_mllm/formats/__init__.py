"""Checkpoints of the original LLaVA code, in and out."""

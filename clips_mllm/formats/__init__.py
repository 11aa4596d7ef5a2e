"""Conversion of checkpoints to and from the original LLaVA code."""

"""Encoder checkpoints: strict loading, saving, and conversion to and from open_clip."""

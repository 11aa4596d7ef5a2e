"""Encoders on disk: strict loading, saving, open_clip in and out."""

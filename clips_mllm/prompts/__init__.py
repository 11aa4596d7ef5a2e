"""Chat templates, and ids and labels in one pass."""

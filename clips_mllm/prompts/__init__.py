"""Chat templates, and rendering of conversations to ids and labels in one pass."""

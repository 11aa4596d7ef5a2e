"""Embedding, recall@k and zero-shot accuracy."""

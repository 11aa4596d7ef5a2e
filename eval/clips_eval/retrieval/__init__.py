"""Retrieval data and measures beyond recall@k."""

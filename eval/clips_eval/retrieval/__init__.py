"""Retrieval data and metrics beyond recall@k."""

"""Instruction data: rows of LLaVA JSON, Parquet and hub sets to batches."""

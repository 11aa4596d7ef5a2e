"""Evaluation: retrieval for the encoder, lmms-eval tasks for the MLLM, one report for both."""

"""Kinds of folders, and the inputs of a training run."""

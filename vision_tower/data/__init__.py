"""Image-text pairs: shards to samples to batches; retrieval and zero-shot data sets."""

"""The CLIPS vision encoder (arXiv 2411.16828): captions, model, losses, data, pretraining, retrieval."""

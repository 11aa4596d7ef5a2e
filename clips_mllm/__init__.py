"""The multimodal LLM: prompts, data, model, the two LLaVA stages, checkpoints, chat."""

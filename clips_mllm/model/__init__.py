"""Tower + projector + LLM as stock LLaVA: building, loading, saving, adapters, quantization."""

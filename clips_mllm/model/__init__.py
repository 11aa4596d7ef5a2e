"""Tower + projector + LLM as stock LLaVA: joining, loading, saving, adapters, quantisation."""

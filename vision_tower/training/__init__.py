"""Parts of a training run beyond `transformers.Trainer`, shared by pretraining and both LLaVA stages."""

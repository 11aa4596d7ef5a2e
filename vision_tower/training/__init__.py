"""What every training run needs beyond `transformers.Trainer`, whatever it trains."""

"""CLIPS pretraining: recipe, trainer, evaluation inside a run."""

"""lmms-eval integration: our model class, tasks, image controls, resuming."""

"""lmms-eval: our model class, tasks, controls, resumption."""

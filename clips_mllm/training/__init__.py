"""The two LLaVA stages: recipe, what trains, trainer, checks before step 1."""

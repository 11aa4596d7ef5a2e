"""Memory, batch and time of a recipe before it runs."""

"""The report of a run: one page of numbers, plots and examples."""

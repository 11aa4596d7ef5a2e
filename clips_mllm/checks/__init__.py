"""Checks of the data before a run: the doctor, the preview, the sample check."""

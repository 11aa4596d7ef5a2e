"""Data looked at before a run: the doctor, the preview, the sample check."""

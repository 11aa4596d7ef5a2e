"""What a folder is and where it came from."""

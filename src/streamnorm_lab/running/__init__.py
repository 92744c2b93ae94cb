"""Training, and many runs side by side."""

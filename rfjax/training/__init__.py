"""Training: stages, the loop that runs them, and what it keeps."""

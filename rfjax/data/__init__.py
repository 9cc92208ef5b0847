"""Clips to train on: drawn or taken from files, kept as datasets on disk, and read in batches."""

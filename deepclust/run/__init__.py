"""A run directory: layout, lock, checkpoints, and what it reports."""

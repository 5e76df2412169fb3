"""Tar shards: where they are, what is in them, and the index of every sample."""

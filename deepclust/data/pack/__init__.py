"""Shuffled tar shards from images of any source."""

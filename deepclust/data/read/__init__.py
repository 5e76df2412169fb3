"""Batches of crops from shards, by worker processes and caches."""

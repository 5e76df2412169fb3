"""Compact class activation maps, by the norms of nested half-planes."""

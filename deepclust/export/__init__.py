"""The files that a trained backbone leaves in, and how they are loaded again."""

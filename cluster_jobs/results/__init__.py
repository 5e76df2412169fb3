"""What users take from a finished run: assignments, scores, clusters of any features."""

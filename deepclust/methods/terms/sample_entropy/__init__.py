"""Mean entropy of single predictions (Grandvalet and Bengio, NeurIPS 2004)."""

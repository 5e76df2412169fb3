"""Features into clusters: moments, whitening, k-means, and what the assignments look like."""

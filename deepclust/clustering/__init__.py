"""From features to assignments: points, whitening, k-means, statistics."""

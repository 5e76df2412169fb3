"""MoCo v2 (Chen et al., 2020): momentum contrast with a queue."""

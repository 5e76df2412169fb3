"""MoCo v3 (Chen et al., ICCV 2021): momentum contrast within the batch."""

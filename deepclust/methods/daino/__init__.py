"""Daino (Fini et al., CVPR 2023): DINO with labels."""

"""Suave (Fini et al., CVPR 2023): SwAV with labels."""

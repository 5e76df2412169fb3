"""SwAV (Caron et al., NeurIPS 2020)."""

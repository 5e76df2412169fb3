"""Entropy of the mean prediction (Joulin and Bach, 2012; Assran et al., ICCV 2021)."""

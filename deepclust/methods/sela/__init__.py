"""SeLa, self-labelling (Asano et al., ICLR 2020)."""

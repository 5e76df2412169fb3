"""Virtual adversarial training (Miyato et al., 2018)."""

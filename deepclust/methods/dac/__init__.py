"""DAC (Chang et al., ICCV 2017)."""

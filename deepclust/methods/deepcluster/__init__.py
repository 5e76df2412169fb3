"""DeepCluster (Caron et al., ECCV 2018)."""

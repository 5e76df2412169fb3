"""A trained run or exported file, to ask for features, clusters and classes of any images."""

"""The stages of a run: extract, cluster, train, and what they are built from."""

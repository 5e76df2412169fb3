"""The clustering module of SuperCM: soft k-means about the means of labelled classes."""

"""Labelled seeds: the table of labels, and what they do in a round."""

"""The table of methods: a name in the recipe, a class in a file of its own."""

from __future__ import annotations

from deepclust.methods.deepcluster import DeepCluster

METHODS = {"deepcluster": DeepCluster}

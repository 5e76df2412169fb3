"""Backbones: images to features."""

from deepclust.models.backbone import Backbone
from deepclust.models.catalog import BACKBONES, build_backbone, check_norms, check_sizes

__all__ = ["BACKBONES", "Backbone", "build_backbone", "check_norms", "check_sizes"]

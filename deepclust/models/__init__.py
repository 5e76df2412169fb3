"""Backbones (images to features) and heads (features to logits); no data, no rounds in here."""

from deepclust.models.backbone import Backbone
from deepclust.models.build import BACKBONES, build_backbone
from deepclust.models.heads import CentroidHead, LinearHead

__all__ = ["BACKBONES", "Backbone", "CentroidHead", "LinearHead", "build_backbone"]

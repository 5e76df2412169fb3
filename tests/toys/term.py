"""A term of somebody else: `terms={tests.toys.term: {weight: 1}}` classifies labelled images."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from deepclust.methods.base import Batch, Method, Output, Setting
from deepclust.methods.parts.heads import LinearHead
from deepclust.methods.terms import term
from deepclust.recipe.sections import TermSection


class Config(TermSection):
    uses_labels: ClassVar[bool] = True

    classes: int = 4


class Term(term.Term):
    def __init__(self, config: TermSection, width: int, setting: Setting) -> None:
        super().__init__(config, width, setting)
        assert isinstance(config, Config)
        self.classifier = LinearHead(width, config.classes, seed=setting.seed)

    def forward(self, method: Method, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None
        logits = self.classifier(output.features)
        loss = F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum")
        return loss / len(logits)

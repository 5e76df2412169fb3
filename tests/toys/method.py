"""A method of somebody else, which uses all of the contract: `method.name=tests.toys.method`.

Crops of two sizes are classified into the clusters of two heads, labelled images into their
classes, and small crops follow a teacher, which is what is clustered and exported.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting, Targets
from deepclust.methods.parts.heads import LinearHead
from deepclust.methods.parts.teacher import Teacher
from deepclust.models.backbone import Backbone
from deepclust.recipe import Recipe
from deepclust.recipe.declare import Cost, Crops, Pass, Refresh
from deepclust.recipe.sections import ClusteringMethodSection, Data
from deepclust.world import derive


class Config(ClusteringMethodSection):
    name: Literal["tests.toys.method"] = "tests.toys.method"
    labels: ClassVar = "required"
    answers: ClassVar = "classes"
    trunk: ClassVar = "teacher.backbone"

    momentum: float = 0.9
    classes: int = 4

    @property
    def round(self) -> Refresh:
        return Refresh(heads=2, resets=True)

    def crops(self, data: Data) -> tuple[Crops, ...]:
        assert data.local is not None
        local = Crops(data.local.count, data.local.size, data.local.scale, turns=4, colour=False)
        return (Crops(2, data.size, data.crop_scale), local)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        assert recipe.data.local is not None
        size, local = recipe.data.size, recipe.data.local
        trained = Pass("backbone", 2, size), Pass("backbone", local.count, local.size)
        row = 4 * (width + 1)
        return Cost(
            (*trained, Pass("teacher.backbone", 1, size, trained=False)),
            per_cluster=2 * row,
            fixed=self.classes * row,
        )

    def chance_loss(self, recipe: Recipe) -> float:
        return math.log(recipe.clustering.k) + math.log(self.classes)

    def misfit(self, recipe: Recipe) -> str | None:
        return None if recipe.data.local else "the toy needs data.local"


class Method(base.Method):
    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config, cluster = setting.config, setting.cluster
        assert isinstance(config, Config)
        assert cluster is not None
        self.momentum = config.momentum
        self.heads = nn.ModuleList(
            LinearHead(backbone.dim, cluster.k, seed=derive(setting.seed, h)) for h in range(2)
        )
        self.classifier = LinearHead(backbone.dim, config.classes, seed=setting.seed)
        self.teacher = Teacher(backbone=backbone)

    def loss(self, batch: Batch) -> Output:
        full, small = batch.crops[:2], batch.crops[2:]
        features = self.backbone(torch.cat(full))
        logits = [head(features) for head in self.heads]
        clusters = sum(
            F.cross_entropy(row, ids.repeat(len(full)))
            for row, ids in zip(logits, batch.pseudo_labels, strict=True)
        )
        first = features[: len(batch.sample_ids)]
        answers = self.classify(first)
        known = F.cross_entropy(answers, batch.labels, ignore_index=-1, reduction="sum")
        classes = known / len(first)
        with torch.no_grad():
            taught = self.teacher.backbone(full[0])
        followed = F.mse_loss(self.backbone(torch.cat(small)), taught.repeat(len(small), 1))
        metrics = {"classes": classes.detach(), "followed": followed.detach()}
        loss = clusters + classes + followed
        return Output(loss, metrics, first, answers)

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(features)

    @torch.no_grad()
    def adopt(self, targets: Targets, seed: int) -> dict[str, Tensor]:
        renewed = {}
        for h, head in enumerate(self.heads):
            head.reset(derive(seed, "head", targets.round, h))
            renewed |= {
                f"heads.{h}.{name}": torch.ones(len(parameter), dtype=torch.bool)
                for name, parameter in head.named_parameters()
            }
        return renewed

    def renewed(self) -> tuple[str, ...]:
        return ("heads",)

    @torch.no_grad()
    def before_step(self, batch: Batch) -> None:
        self.classifier.weight.clamp_(-1, 1)

    def frozen(self, now: Now) -> tuple[str, ...]:
        return ("classifier.weight",) if now.epochs < 0.2 else ()

    def after_step(self, now: Now) -> None:
        self.teacher.follow(self.momentum, backbone=self.backbone)

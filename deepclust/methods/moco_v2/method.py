"""MoCo v2: among the keys of many past images, find that of the same image.

Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020 (arXiv 2003.04297). Loss
and order of a step are eq. 1 and algorithm 1 of He et al., "Momentum Contrast", CVPR 2020 (arXiv
1911.05722). Keys come from a moving average of the network, negatives from a queue. As in the
reference (facebookresearch/moco) the query's backbone is what is exported.

A batch norm may see a query and its key with the same other images. Then the network can match
their statistics, without looking at the images (section 3.3 of the latter). So the key crops of all
ranks are shuffled, each rank encodes its part, and keys go back. On one rank a shuffle changes no
batch, and the reference does not run on one. Here a rank encodes its keys in parts, so that there
are at least `groups` parts over all ranks, 8 as the paper had GPUs. A synchronised norm sees a part
of every rank at once, so then every rank has that many. Without batch norms keys stay where they
are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepclust.data.to_device import locked
from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting
from deepclust.methods.moco_v2.config import Config
from deepclust.methods.parts.monitors import spread
from deepclust.methods.parts.projection import projection
from deepclust.methods.parts.queue import Queue
from deepclust.methods.parts.teacher import Teacher
from deepclust.models.backbone import Backbone
from deepclust.world import derive


class Method(base.Method):
    """Backbone and projection head, their moving averages, and the queue."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.config, self.seed = config, setting.seed
        widths = [backbone.dim, config.hidden, config.out]
        self.projection = projection(widths, setting.seed, norms=False)
        self.teacher = Teacher(backbone=backbone, projection=self.projection)
        self.queue = Queue(config.queue, config.out, setting.world, setting.seed)
        self._fresh: list[Tensor] = []  # keys of this step's parts, until they are queued

    def loss(self, batch: Batch) -> Output:
        """Return InfoNCE of the first crop's projection: the second's key against the queue."""
        first, second = batch.crops
        features = self.backbone(first)
        projected = self.projection(self.backbone.activation(features))
        queries, keys = F.normalize(projected.float()), self.keys(second, batch.now)
        self._fresh.append(keys)
        loss = info_nce(queries, keys, self.queue.rows, self.config.temperature)
        return Output(loss, spread(queries), features)

    @torch.no_grad()
    def keys(self, crops: Float[Tensor, "b 3 s s"], now: Now) -> Float[Tensor, "b d"]:
        """Return the unit keys of this rank's crops, normed in the company of others."""
        backbone, head = map(self.teacher.get_submodule, ("backbone", "projection"))
        parts = self._shuffled(crops, now)
        keys = torch.cat([head(self.backbone.activation(backbone(part))) for part in parts])
        return F.normalize(self._put_back(keys, now).float())

    def after_step(self, now: Now) -> None:
        """Queue the step's keys, and let the key encoder follow."""
        self.queue.push(torch.cat(self._fresh), now.step)
        self._fresh.clear()
        self.teacher.follow(
            self.config.momentum, backbone=self.backbone, projection=self.projection
        )

    # what depends on the step's number is not compiled: it would be, again for every step
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _shuffled(self, crops: Tensor, now: Now) -> tuple[Tensor, ...]:
        """Return this rank's part of all ranks' shuffled crops, in the groups that are normed."""
        groups = groups_of(self.teacher, self.config.groups, self.world.size)
        if groups == 0:
            return (crops,)
        mine = self._mine(self._order(len(crops), now), crops.device)
        rows = self.world.all_gather_rows(crops)[mine]
        rows = rows.contiguous(memory_format=torch.channels_last)
        return rows.tensor_split(max(1, min(groups, len(rows) // 2)))  # a norm needs two rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _put_back(self, keys: Tensor, now: Now) -> Tensor:
        """Return the keys of this rank's own crops, of the ranks' shuffled keys."""
        if groups_of(self.teacher, self.config.groups, self.world.size) == 0:
            return keys
        places = self._mine(self._order(len(keys), now).argsort(), keys.device)
        return self.world.all_gather_rows(keys)[places]

    def _mine(self, order: Int64[Tensor, " g"], device: torch.device) -> Int64[Tensor, " b"]:
        """Return this rank's share of an order, on the device."""
        share = order.chunk(self.world.size)[self.world.rank]
        return locked(share, device).to(device, non_blocking=True)

    def _order(self, share: int, now: Now) -> Int64[Tensor, " g"]:
        """Return the shuffled order of all ranks' rows, the same on every rank."""
        random = torch.Generator().manual_seed(derive(self.seed, "shuffle", now.step))
        return torch.randperm(share * self.world.size, generator=random)


def info_nce(
    queries: Float[Tensor, "b d"],
    keys: Float[Tensor, "b d"],
    queue: Float[Tensor, "k d"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Mean of -log softmax([query . its key, query . queue] / T) at its key, for unit rows."""
    with torch.autocast(queries.device.type, enabled=False):
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.T], 1) / temperature
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))


def groups_of(teacher: nn.Module, groups: int, ranks: int) -> int:
    """Return in how many groups each rank encodes its keys, 0 where no batch norm could tell."""
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 0
    together = all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    return groups if together else -(-groups // ranks)

"""One batch: from the sample ids that a plan asks for to a uint8 tensor of their views.

This is what runs in the loader's worker processes. An image is read and decoded once for all its
views. A sample that cannot be read never shifts the others: its place is taken by a deterministic
member of its cluster, or of all samples where there are no clusters (training), or stays black
(extraction), and it is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import View, uniform
from deepclust.data.images.decode import MAX_PIXELS, decode
from deepclust.data.read.shard_files import ShardFiles
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import UnreachableError
from deepclust.errors import DataError
from deepclust.world import derive

REPLACEMENTS = 8  # members of the cluster that are tried, and then as many of all samples


@dataclass(frozen=True)
class Request:
    """A batch to load. `key` = derive(seed, "view", epoch) is what its views are drawn from.

    Bad samples are replaced if there are `assignments` (int32 .npy [n] or [heads, n]; then by a
    member of the same cluster) or if `replace` says so (then by any sample that the index has).
    """

    ids: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]
    key: int
    view: View
    assignments: Path | None = None
    views: int = 1
    colour: Colour | None = None  # None: colours stay, or are changed later on the device
    replace: bool = False

    @property
    def keys(self) -> list[int]:
        """What each view is drawn from; the first is `key` itself."""
        return [self.key, *(derive(self.key, "view", v) for v in range(1, self.views))]


@dataclass(frozen=True)
class Bad:
    """A sample that could not be read, where, why, and the sample in its place (-1: none)."""

    sample_id: int
    position: int
    replacement: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """A loaded batch; `ids` are the samples that the images really show, in every view."""

    images: UInt8[Tensor, "views b 3 s s"]
    ids: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]
    bad: list[Bad] = field(default_factory=list)

    def pin_memory(self) -> Loaded:
        """The same in page-locked memory; the DataLoader calls this where there is a GPU."""
        return replace(self, images=self.images.pin_memory())


class Batches(Dataset[Loaded]):
    """`batches[request]` is the loaded batch: a map from requests, for torch's DataLoader."""

    def __init__(self, index: Index, staged: Path | None = None, max_pixels: int = MAX_PIXELS):
        self.index, self.max_pixels = index, max_pixels
        self.files = ShardFiles(index.shards, staged)
        self._labels: tuple[Path, Int32[np.ndarray, " n"]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the index and the assignments again instead of copying them."""
        return Batches, (self.index, self.files.staged, self.max_pixels)

    def __getitem__(self, request: Request) -> Loaded:
        """Read, decode and view every sample of the request."""
        size = request.view.size
        images = torch.zeros((request.views, len(request.ids), 3, size, size), dtype=torch.uint8)
        ids, bad = request.ids.copy(), []
        for row, reason in self._fill(images, request):
            ids[row], entry = self._replace(images[:, row], request, row, reason)
            bad.append(entry)
        self.files.release()
        if request.colour is not None:
            for v, view in enumerate(images):
                draws = request.colour.draws(derive(request.key, "colour", v), request.positions)
                view.copy_(request.colour(view, draws))
        return Loaded(images, ids, request.positions, bad)

    def _fill(
        self, images: UInt8[Tensor, "views b 3 s s"], request: Request
    ) -> list[tuple[int, str]]:
        """Load what can be loaded; return the rows that could not, and why. The hot loop."""
        view, read, limit, failed = request.view, self.files.read, self.max_pixels, []
        places = zip(*(column.tolist() for column in self.index.locate(request.ids)), strict=True)
        draws = zip(*(view.draws(key, request.positions) for key in request.keys), strict=True)
        rows = zip(*(of_view.unbind() for of_view in images.unbind()), strict=True)
        for row, (targets, place, drawn) in enumerate(zip(rows, places, draws, strict=True)):
            try:
                image = decode(read(*place), limit)
            except UnreachableError:
                raise  # a whole shard would be replaced
            except DataError as error:
                failed.append((row, str(error)))
                continue
            for target, draw in zip(targets, drawn, strict=True):
                target.copy_(view(image, draw))
        return failed

    def _replace(
        self, targets: UInt8[Tensor, "views 3 s s"], request: Request, row: int, reason: str
    ) -> tuple[int, Bad]:
        """Put another sample into a row, if the request allows it; its id and the report."""
        sample, position = int(request.ids[row]), int(request.positions[row])
        reason = f"{self.index.where(sample)}: {self.index.excluded.get(sample, reason)}"
        if request.assignments is None and not request.replace:
            return sample, Bad(sample, position, -1, reason)
        for substitute in self._substitutes(request, sample, position):
            one = replace(request, ids=np.array([substitute]), positions=np.array([position]))
            if not self._fill(targets[:, None], one):
                return substitute, Bad(sample, position, substitute, reason)
        raise DataError(
            f"{reason}; nor could {2 * REPLACEMENTS} samples in its place. Is the storage there?"
        )

    def _substitutes(self, request: Request, sample: int, position: int) -> Iterator[int]:
        """Members of the sample's cluster in an order drawn for its position, then any samples."""
        key = derive(request.key, "replacement")
        u = uniform(key, np.array([position]), 2 * REPLACEMENTS).reshape(2, REPLACEMENTS)
        if request.assignments is None:
            yield from (i for i in self._known(u.ravel()).tolist() if i != sample)
            return
        labels = self._assignments(request.assignments)
        for members, numbers in ((labels == labels[sample], u[0]), (np.True_, u[1])):
            choices = np.flatnonzero(members & (labels >= 0))
            choices = choices[choices != sample]
            if len(choices):
                yield from choices[(numbers * len(choices)).astype(np.int64)].tolist()

    def _known(self, numbers: Float64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """For numbers in [0, 1) as many samples that the index does not exclude."""
        excluded = np.sort(np.array(list(self.index.excluded), np.int64))
        ranks = (numbers * (len(self.index) - len(excluded))).astype(np.int64)
        before = excluded - np.arange(len(excluded))  # how many known samples lie before each
        return ranks + np.searchsorted(before, ranks, side="right")

    def _assignments(self, path: Path) -> Int32[np.ndarray, " n"]:
        if self._labels is None or self._labels[0] != path:
            stored: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
            self._labels = path, stored if stored.ndim == 1 else stored[0]
        return self._labels[1]

"""One batch: from the sample ids that a plan asks for to the uint8 crops of their images.

This is what runs in the loader's worker processes. An image is read and decoded once for all its
crops, of whatever sizes. A sample that cannot be read never shifts the others, and is reported.
Training puts another sample into its row: a member of its cluster, or any sample where there are no
clusters. Extraction leaves the row black.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from deepclust.data.images.complaints import Complaints
from deepclust.data.images.crops import Crop
from deepclust.data.images.decode import MAX_PIXELS, decode
from deepclust.data.images.draws import uniform
from deepclust.data.read.image_files import open_images
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import UnreachableError
from deepclust.errors import DataError
from deepclust.world import derive

REPLACEMENTS = 8  # members of the cluster that are tried, and then this number of all samples


@dataclass(frozen=True)
class Request:
    """A batch to load: its samples, their positions in the plan, and the crops of each image.

    Crops are drawn from `key`, which is derive(seed, "view", epoch) in training. A sample that
    cannot be read is replaced by a member of its cluster if there are `assignments` (int32 .npy [n]
    or [heads, n]). Without them, `replace` asks for any sample of the index. `tag` is the caller's,
    and comes back with the batch.
    """

    sample_ids: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]
    key: int
    crops: tuple[Crop, ...]
    assignments: Path | None = None
    replace: bool = False
    tag: int = 0

    @property
    def keys(self) -> list[int]:
        """What each crop is drawn from, the first from `key` itself."""
        return [self.key, *(derive(self.key, "view", v) for v in range(1, len(self.crops)))]


@dataclass(frozen=True)
class Bad:
    """A sample that could not be read, and the reason with its place."""

    sample_id: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """A loaded batch, whose `sample_ids` are the samples that the images really show.

    Images are arrays on their way through a pipe (`sending.py`), tensors otherwise.
    """

    images: tuple[UInt8[Tensor, "b 3 s s"], ...]
    sample_ids: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]
    bad: list[Bad] = field(default_factory=list)
    tag: int = 0

    @property
    def in_pipe(self) -> bool:
        """Whether there was no shared memory for the images."""
        return not all(isinstance(images, Tensor) for images in self.images)

    def pin_memory(self) -> Loaded:
        """Return the same in page-locked memory, as the DataLoader wants it for a GPU."""
        if self.in_pipe:
            return self
        return replace(self, images=tuple(images.pin_memory() for images in self.images))


class Batches(Dataset[Loaded]):
    """The loaded batch of each request, `batches[request]`, for torch's DataLoader.

    `cache` is a folder with copies of shards (`shard_cache.py`).
    """

    def __init__(self, index: Index, cache: Path | None = None, max_pixels: int = MAX_PIXELS):
        self.index, self.max_pixels = index, max_pixels
        self.files = open_images(index, cache)
        self.complaints = Complaints()
        self._clusters: tuple[Path, Int32[np.ndarray, " n"]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what opens the index and the assignments, which another process maps again."""
        return Batches, (self.index, self.files.cache, self.max_pixels)

    def __getitem__(self, request: Request) -> Loaded:
        """Read, decode and crop every sample of the request, then change the colours."""
        sides = [crop.view.size for crop in request.crops]
        b = len(request.sample_ids)
        images = tuple(torch.zeros((b, 3, side, side), dtype=torch.uint8) for side in sides)
        sample_ids, bad = request.sample_ids.copy(), []
        for row, reason in self._fill(images, request):
            row_images = tuple(of_crop[row : row + 1] for of_crop in images)
            sample_ids[row], entry = self._replace(row_images, request, row, reason)
            bad.append(entry)
        self.files.release()
        for v, (crop, of_crop) in enumerate(zip(request.crops, images, strict=True)):
            if crop.colour is not None:
                draws = crop.colour.draws(derive(request.key, "colour", v), request.positions)
                of_crop.copy_(crop.colour(of_crop, draws))
        return Loaded(images, sample_ids, request.positions, bad, request.tag)

    def _fill(
        self, images: tuple[UInt8[Tensor, "b 3 s s"], ...], request: Request
    ) -> list[tuple[int, str]]:
        """Load what can be loaded, and return the rows that could not, and why."""
        read, limit, failed = self.files.read, self.max_pixels, []
        views, at = [crop.view for crop in request.crops], request.positions
        located = self.index.locate(request.sample_ids)
        places = zip(*(column.tolist() for column in located), strict=True)
        draws = [view.draws(key, at) for view, key in zip(views, request.keys, strict=True)]
        targets = [of_crop.unbind() for of_crop in images]
        for row, place in enumerate(places):
            sample_id = int(request.sample_ids[row])
            try:
                data = read(*place)
                with self.complaints.about(data, partial(self.index.where, sample_id)):
                    image = decode(data, limit)
            except UnreachableError:
                raise  # a whole shard would be replaced
            except DataError as error:
                failed.append((row, str(error)))
                continue
            for view, drawn, target in zip(views, draws, targets, strict=True):
                target[row].copy_(view(image, drawn[row]))
        return failed

    def _replace(
        self, images: tuple[UInt8[Tensor, "1 3 s s"], ...], request: Request, row: int, reason: str
    ) -> tuple[int, Bad]:
        """Put another sample into a row if the request allows it, and report it."""
        sample_id, position = int(request.sample_ids[row]), int(request.positions[row])
        reason = f"{self.index.where(sample_id)}: {self.index.excluded.get(sample_id, reason)}"
        if request.assignments is None and not request.replace:
            return sample_id, Bad(sample_id, reason)
        for substitute in self._substitutes(request, sample_id, position):
            one = replace(
                request, sample_ids=np.array([substitute]), positions=np.array([position])
            )
            if not self._fill(images, one):
                return substitute, Bad(sample_id, reason)
        raise DataError(
            f"{reason}; neither could {2 * REPLACEMENTS} samples in its place. "
            "Check that the storage can be reached."
        )

    def _substitutes(self, request: Request, sample_id: int, position: int) -> Iterator[int]:
        """Yield members of the sample's cluster, drawn for its position, then any samples."""
        key = derive(request.key, "replacement")
        u = uniform(key, np.array([position]), 2 * REPLACEMENTS).reshape(2, REPLACEMENTS)
        if request.assignments is None:
            yield from (i for i in self._readable(u.ravel()).tolist() if i != sample_id)
            return
        assignments = self._assignments(request.assignments)
        same = assignments == assignments[sample_id]
        for members, numbers in ((same, u[0]), (np.True_, u[1])):
            choices = np.flatnonzero(members & (assignments >= 0))
            choices = choices[choices != sample_id]
            if len(choices):
                yield from choices[(numbers * len(choices)).astype(np.int64)].tolist()

    def _readable(self, numbers: Float64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Return, for each number in [0, 1), a sample id that the index does not exclude."""
        excluded = np.sort(np.array(list(self.index.excluded), np.int64))
        ranks = (numbers * (len(self.index) - len(excluded))).astype(np.int64)
        before = excluded - np.arange(len(excluded))  # readable samples before each
        return ranks + np.searchsorted(before, ranks, side="right")

    def _assignments(self, path: Path) -> Int32[np.ndarray, " n"]:
        """Return the assignments of a file (head 0), mapped once."""
        if self._clusters is None or self._clusters[0] != path:
            stored: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
            self._clusters = path, stored if stored.ndim == 1 else stored[0]
        return self._clusters[1]

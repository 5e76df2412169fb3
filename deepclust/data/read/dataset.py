"""One batch: from the sample ids that a plan asks for to the uint8 crops of their images.

This is what runs in the loader's worker processes. An image is read and decoded once for all its
crops, of whatever sizes. JPEGs that a GPU decodes are read and checked only. A sample that cannot
be read never shifts the others, and is reported. Training puts another sample into its row
(`substitutes.py`). Extraction leaves the row black.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from deepclust.data.images.complaints import Complaints
from deepclust.data.images.crops import Crop, View
from deepclust.data.images.decode import MAX_PIXELS, check_size
from deepclust.data.images.device_crops import Boxes, Jpeg, Packed, each_tensor
from deepclust.data.images.gpu_decode import Encoded
from deepclust.data.images.jpeg_rule import size_of_plain
from deepclust.data.images.reduced import decode_for
from deepclust.data.read.image_files import open_images
from deepclust.data.read.substitutes import Labels, Substitutes
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import UnreachableError
from deepclust.errors import DataError
from deepclust.world import derive


@dataclass(frozen=True)
class Request:
    """A batch to load: its samples, their positions in the plan, and the crops of each image.

    Crops are drawn from `key`, which is derive(seed, "view", epoch) in training. A sample that
    cannot be read is replaced by a member of its cluster if there are `assignments` (int32 .npy [n]
    or [heads, n]). Without them, `replace` asks for any sample of the index. `known` marks the rows
    of labelled samples, which may have crops of their own. `partners` are the rows that the first
    rows are mixed with, -1 for none. Rows beyond theirs are read for that alone, and belong to
    another request, which reports them if they are bad. With `packed` the crops are made by the
    caller (`device_crops.py`), and without their colours. `tag` is the caller's, and comes back
    with the batch.
    """

    sample_ids: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]
    key: int
    crops: tuple[Crop, ...]
    assignments: Path | None = None
    replace: bool = False
    tag: int = 0
    known: Bool[np.ndarray, " b"] | None = None
    partners: Int64[np.ndarray, " own"] | None = None
    packed: bool = False

    @property
    def own(self) -> int:
        """The number of rows that are the request's own."""
        return len(self.sample_ids if self.partners is None else self.partners)

    @property
    def substitutes(self) -> bool:
        """Whether a sample that cannot be read is replaced."""
        return self.replace or self.assignments is not None

    def alone(self, row: int, sample_id: int) -> Request:
        """Return the request of one row, for another sample."""
        known = None if self.known is None else self.known[row : row + 1]
        ids, at = np.array([sample_id]), self.positions[row : row + 1]
        return replace(self, sample_ids=ids, positions=at, known=known, partners=None)

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

    Images are arrays on their way through a pipe (`sending.py`), tensors otherwise. JPEGs that are
    still `encoded` belong to them, with the request, which their substitutes need.
    """

    images: tuple[Any, ...]  # UInt8[Tensor, "b 3 s s"], or Packed if the request was `packed`
    sample_ids: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]
    bad: list[Bad] = field(default_factory=list)
    tag: int = 0
    known: Bool[np.ndarray, " b"] | None = None
    partners: Int64[np.ndarray, " own"] | None = None
    encoded: Encoded | None = None
    asked: Request | None = None

    @property
    def in_pipe(self) -> bool:
        """Whether there was no shared memory for the images."""
        firsts = (i.pixels if isinstance(i, Packed) else i for i in self.images)
        return not all(isinstance(first, Tensor) for first in firsts)

    def pin_memory(self) -> Loaded:
        """Return the same in page-locked memory, as the DataLoader wants it for a GPU."""
        if self.in_pipe:
            return self
        return self.each(lambda tensor: tensor.pin_memory())

    def each(self, change: Callable[[Any], Any]) -> Loaded:
        """Return the same with every tensor of the images changed."""
        images, encoded = tuple(each_tensor(one, change) for one in self.images), self.encoded
        if encoded is not None:
            encoded = replace(encoded, data=change(encoded.data))
        return replace(self, images=images, encoded=encoded)


class Made:
    """The crops of a batch, made row by row; a row without an image is black."""

    def __init__(self, crops: UInt8[Tensor, "b 3 s s"]) -> None:
        self.crops, self._rows = crops, crops.unbind()

    @classmethod
    def black(cls, count: int, size: int) -> Made:
        """Return `count` rows without an image."""
        return cls(torch.zeros((count, 3, size, size), dtype=torch.uint8))

    def put(self, row: int, image: UInt8[Tensor, "3 h w"] | Jpeg, view: View, draw: Any) -> None:
        """Make a row's crop, of an image that is decoded."""
        assert isinstance(image, Tensor)
        self._rows[row].copy_(view(image, draw))

    def pack(self, _starts: object = None) -> UInt8[Tensor, "b 3 s s"]:
        """Return the crops."""
        return self.crops


class Batches(Dataset[Loaded]):
    """The loaded batch of each request, `batches[request]`, for torch's DataLoader.

    `cache` is a folder with copies of shards (`shard_cache.py`). `labels` are what samples are
    replaced by. `decoder` is the recipe's `data.decode`. With "gpu" a GPU is to decode the JPEGs
    that it can (`jpeg_rule.py`), so all crops are packed.
    """

    def __init__(
        self,
        index: Index,
        cache: Path | None = None,
        max_pixels: int = MAX_PIXELS,
        labels: Labels | None = None,
        decoder: str = "cpu",
    ):
        self.index, self.max_pixels, self.decoder = index, max_pixels, decoder
        self.for_gpu = decoder == "gpu"
        self.substitutes = Substitutes(index, labels)
        self.files = open_images(index, cache)
        self.complaints = Complaints()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what opens the index and the assignments, which another process maps again."""
        labels = self.substitutes.labels
        return Batches, (self.index, self.files.cache, self.max_pixels, labels, self.decoder)

    def __getitem__(self, request: Request) -> Loaded:
        """Read, decode and crop every sample of the request, then change the colours."""
        sides = [crop.view.size for crop in request.crops]
        b = len(request.sample_ids)
        kind = Boxes if request.packed or self.for_gpu else Made
        rows = tuple(kind.black(b, side) for side in sides)
        sample_ids, bad = request.sample_ids.copy(), []
        for row, reason in self._fill(rows, request):
            sample_ids[row], entry = self._replace(rows, request, row, reason)
            bad += [entry] * (row < request.own)
        self.files.release()
        at, known = request.positions, request.known
        first = rows[0]
        encoded = Encoded.of(first.images) if self.for_gpu and isinstance(first, Boxes) else None
        starts = None if encoded is None else encoded.starts
        images = tuple(of_crop.pack(starts) for of_crop in rows)
        for v, (crop, of_crop) in enumerate(zip(request.crops, images, strict=True)):
            if crop.colour is not None and isinstance(of_crop, Tensor):
                of_crop.copy_(crop.coloured(of_crop, derive(request.key, "colour", v), at, known))
        loaded = Loaded(images, sample_ids, at, bad, request.tag, known, request.partners)
        return replace(loaded, encoded=encoded, asked=request) if self.for_gpu else loaded

    def _fill(
        self, images: tuple[Boxes | Made, ...], request: Request, first: int = 0
    ) -> list[tuple[int, str]]:
        """Load what can be loaded into the rows from `first` on; return those that failed, why."""
        read, failed = self.files.read, []
        views, at = [crop.view for crop in request.crops], request.positions
        located = self.index.locate(request.sample_ids)
        places = zip(*(column.tolist() for column in located), strict=True)
        draws = [
            crop.draws(key, at, request.known)
            for crop, key in zip(request.crops, request.keys, strict=True)
        ]
        for row, place in enumerate(places):
            sample_id = int(request.sample_ids[row])
            try:
                crops = [(view, drawn[row]) for view, drawn in zip(views, draws, strict=True)]
                image = self._image(read(*place), sample_id, crops)
            except UnreachableError:
                raise  # a whole shard would be replaced
            except DataError as error:
                failed.append((row, str(error)))
                continue
            for crop, of_crop in zip(crops, images, strict=True):
                of_crop.put(first + row, image, *crop)
        return failed

    def _image(
        self, data: bytes | memoryview, sample_id: int, crops: list[tuple[View, Any]]
    ) -> UInt8[Tensor, "3 h w"] | Jpeg:
        """Decode an image, or leave it to a GPU by what its bytes say; DataError for a bad one."""
        size = size_of_plain(data) if self.for_gpu else None
        if size is not None:
            check_size(*size, self.max_pixels)
            return Jpeg(bytes(data), size)
        with self.complaints.about(data, partial(self.index.where, sample_id)):
            return decode_for(crops, data, self.max_pixels, self.decoder)

    def _replace(
        self, images: tuple[Boxes | Made, ...], request: Request, row: int, reason: str
    ) -> tuple[int, Bad]:
        """Put another sample into a row if the request allows it, and report it."""
        sample_id = int(request.sample_ids[row])
        reason = self.placed(sample_id, reason)
        if not request.substitutes:
            return sample_id, Bad(sample_id, reason)
        candidates = self.candidates(request, row)
        for substitute in candidates:
            if not self._fill(images, request.alone(row, substitute), row):
                return substitute, Bad(sample_id, reason)
        raise no_substitute(reason, len(candidates))

    def placed(self, sample_id: int, reason: str) -> str:
        """Return why a sample cannot be read, and where it is."""
        return f"{self.index.where(sample_id)}: {self.index.excluded.get(sample_id, reason)}"

    def candidates(self, request: Request, row: int) -> list[int]:
        """Return the samples for the place of a row that cannot be read, as they are tried."""
        at = int(request.sample_ids[row]), request.key, int(request.positions[row])
        return list(self.substitutes.of(*at, request.assignments))


def no_substitute(reason: str, tried: int) -> DataError:
    """Return the error of a sample of whose candidates none can be read either."""
    return DataError(
        f"{reason}; neither could {tried} samples in its place. "
        "Check that the storage can be reached."
    )

"""Frames: float64 rows are centred and scaled before they are narrowed to float32.

k-means and whitening compute in float32. Rows at an offset of 1e8 lose all their digits when they
are narrowed as they are. Distances of rows of 1e-25 or 1e25 underflow or overflow. Neither the
offset nor the scale changes a clustering, so both are taken out first and put back into the result.

Float32 rows keep their bits, and so do float64 rows that hold float32 values. They are scaled by a
power of two, and only where the squares of their differences leave the range of float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from deepclust.clustering.points import Rows, as_tensor, in_range
from deepclust.errors import NumericalError

SAMPLE = 1024  # rows that tell the offset and the scale
BLOCK = 2**22  # numbers that are looked at a time
NARROW = ("float16", "bfloat16", "int8", "uint8", "int16", "uint16", "bool")  # float32 holds all
EASY = 40  # differences from 2^-40 to 2^40 need no scale
LARGEST, SMALLEST = 62, -60  # exponents of numbers whose squares float32 holds, with some room
OFFSET = 4.0  # an offset of so many differences costs float32 two bits


@dataclass(frozen=True)
class Frame:
    """The map of rows x to (x - origin) * scale in float32; `scale` is a power of two.

    Without an origin (spherical) each row is scaled by itself, which keeps its direction.
    """

    origin: Float64[Tensor, " d"] | None
    scale: float = 1.0

    def narrow(self, rows: Float[Tensor, "m d"]) -> Float32[Tensor, "m d"]:
        """Return rows in the frame."""
        wide = rows.double()
        if self.origin is None:
            return in_range(wide).float()
        return ((wide - self.origin.to(wide.device)) * self.scale).float()

    def widen(self, rows: Float32[np.ndarray, "m d"]) -> Float64[np.ndarray, "m d"]:
        """Return rows of the frame, such as centroids, in the coordinates of the caller."""
        assert self.origin is not None, "unit rows have no other coordinates"
        origin: Float64[np.ndarray, " d"] = self.origin.cpu().numpy()
        widened: Float64[np.ndarray, "m d"] = rows.astype(np.float64) / self.scale + origin
        return widened

    @property
    def area(self) -> float:
        """What a squared distance in the frame is multiplied by to be one of the caller's."""
        return self.scale**-2


def frame_of(rows: Rows, *, spherical: bool = False) -> Frame | None:
    """Return the frame that rows [n, d] need, or None if float32 takes them as they are.

    Offset and spread are medians of at most 1024 rows, so a few far rows do not move them.

    Raises `NumericalError` naming the row and the value that float32 cannot hold beside the others.
    """
    dtype = str(rows.dtype).removeprefix("torch.")
    if dtype in NARROW or rows.ndim != 2 or len(rows) == 0:
        return None
    wide = dtype != "float32"
    if spherical:
        return Frame(None) if wide else None
    sample = _sample(rows)
    origin = torch.from_numpy(np.median(sample, 0)) if wide else torch.zeros(rows.shape[1]).double()
    typical = _typical(sample - origin.numpy())
    easy = -EASY <= math.log2(typical) <= EASY
    if (not wide and easy) or (wide and _are_float32(rows) and easy):
        return None
    if not _is_offset(sample, origin.numpy()):
        origin = torch.zeros_like(origin)
    exponent = _exponent(rows, origin, typical, 0 if easy else -round(math.log2(typical)))
    if exponent == 0 and not origin.any():
        return None
    return Frame(origin, 2.0**exponent)


def _sample(rows: Rows) -> Float64[np.ndarray, "s d"]:
    """Return evenly spaced rows, without those that are not finite."""
    places = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64))
    where = torch.from_numpy(places).to(rows.device) if isinstance(rows, Tensor) else places
    sample: Float64[np.ndarray, "s d"] = as_tensor(rows[where]).detach().double().cpu().numpy()
    sound = sample[np.isfinite(sample).all(1)]
    return sound if len(sound) else np.zeros((1, sample.shape[1]))


def _typical(differences: Float64[np.ndarray, "s d"]) -> float:
    """Return the median magnitude of those that are not zero, or 1 without any."""
    magnitudes = np.abs(differences)
    return float(np.median(magnitudes[magnitudes > 0])) if magnitudes.any() else 1.0


def _is_offset(sample: Float64[np.ndarray, "s d"], origin: Float64[np.ndarray, " d"]) -> bool:
    spread = np.median(np.abs(sample - origin), 0).max()
    return bool(np.abs(origin).max() > OFFSET * spread)


def _exponent(rows: Rows, origin: Float64[Tensor, " d"], typical: float, wanted: int) -> int:
    """Return the exponent of the scale: the wanted one, or less for the largest number to fit."""
    row, value, reach = farthest(rows, origin)
    if reach == 0:
        return 0
    exponent = min(wanted, LARGEST - math.ceil(math.log2(reach)))
    if exponent < wanted and exponent + math.log2(typical) < SMALLEST:
        raise NumericalError(too_far(row, value))
    return exponent


def farthest(rows: Rows, origin: Float64[Tensor, " d"] | float = 0.0) -> tuple[int, float, float]:
    """Return the row and value of the number farthest from the origin, and how far it is."""
    row, value, reach = 0, 0.0, 0.0
    for start, block in _blocks(rows):
        distances = (block - torch.as_tensor(origin).to(block)).abs()
        distances = torch.where(torch.isfinite(distances), distances, 0.0)
        place = int(distances.argmax())
        if float(distances.flatten()[place]) > reach:
            row = start + place // block.shape[1]
            value, reach = float(block.flatten()[place]), float(distances.flatten()[place])
    return row, value, reach


def too_far(row: int, value: float) -> str:
    """Return the message for a number whose square leaves float32 beside the other rows'."""
    return (
        f"row {row} holds {value:g}, which is too far from the other rows for float32: their "
        "distances cannot be compared. Leave that row out, or scale its column down."
    )


def _are_float32(rows: Rows) -> bool:
    """Return whether float32 holds every number exactly."""
    return all(
        bool(((block.float().double() == block) | ~torch.isfinite(block)).all())
        for _, block in _blocks(rows)
    )


def _blocks(rows: Rows) -> Iterator[tuple[int, Float64[Tensor, "m d"]]]:
    """Yield the rows in float64, some at a time, with the number of the first."""
    size = max(1, BLOCK // rows.shape[1])
    for start in range(0, len(rows), size):
        yield start, as_tensor(rows[start : start + size]).detach().double()

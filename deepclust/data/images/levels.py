"""From 16 bits, signed and float values to 8 bits: which value is black, and which is white.

A file seldom says it. 12 bits of a microscope are stored in 16, temperatures in float. So there is
one rule, and `pack --range` chooses it:

auto      Unsigned 16 bits are 0:65535, if the image reaches a quarter of that, or is all 0. Fewer
          bits are taken where the file declares them. Float is 0:1, if the image keeps to that and
          reaches a quarter of it. All other values are refused with a message that names them.
full      The whole range of the type: 0:65535, -32768:32767, and 0:1 of float.
LOW:HIGH  LOW and what is below become black, HIGH and what is above white.
stored    What training and extraction use: as auto, but unsigned 16 bits are always 0:65535.

Images of unsigned 8 bits are never changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Num, UInt8

from deepclust.errors import DataError, RecipeError

Pixels = Num[np.ndarray, " *shape"]
_ENOUGH = 0.25  # of the range: 14 bits and fewer in 16 do not reach it
_UINT16 = 65535
_BLOCK = 1 << 20  # values that are in float64 at once
UNKNOWN = ", and nothing says which is black and which is white."
REMEDY = "Give `deepclust pack` its --range LOW:HIGH, or --range full."


class DecodeError(DataError):
    """An image that cannot be decoded, with the reason and without the sample's name."""


class UnknownRangeError(DecodeError):
    """Values of which nobody has said what is black and what is white."""


@dataclass(frozen=True)
class Levels:
    """A rule of the list above, and for LOW:HIGH its two values."""

    rule: str
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Levels:
        """Read auto, full or LOW:HIGH, or raise RecipeError."""
        if text in ("auto", "full"):
            return cls(text)
        try:
            low, high = map(float, text.split(":"))
            if not low < high or not math.isfinite(high - low):
                raise ValueError
        except ValueError as error:
            raise RecipeError(
                f"the range {text!r} is not auto, full or LOW:HIGH with LOW below HIGH, as 0:4095."
            ) from error
        return cls("given", low, high)

    def to_8_bits(self, pixels: Pixels, declared: int | None = None) -> UInt8[np.ndarray, " *s"]:
        """Return the values as 0..255, rounded.

        `declared` is the largest value that the file itself allows, if it says so. NaN becomes
        LOW where a range was given. Raises UnknownRangeError for what `auto` refuses.
        """
        low, high = self._limits(pixels, declared)
        if pixels.dtype == np.uint16:  # a table has the same results, and needs less memory
            table = _scaled(np.arange(_UINT16 + 1), low, high)
            return np.take(table, pixels)
        flat = pixels.reshape(-1)
        scaled = np.empty(flat.size, np.uint8)
        for start in range(0, flat.size, _BLOCK):
            scaled[start : start + _BLOCK] = _scaled(flat[start : start + _BLOCK], low, high)
        return scaled.reshape(pixels.shape)

    def _limits(self, pixels: Pixels, declared: int | None) -> tuple[float, float]:
        if self.rule == "given":
            return self.low, self.high
        kind = pixels.dtype.kind
        if self.rule == "full":
            return _whole(pixels.dtype, declared)
        if kind == "u" and declared is not None and declared < _UINT16:
            return 0, declared
        if pixels.dtype == np.uint16 and (self.rule == "stored" or _is_used(pixels, _UINT16)):
            return 0, _UINT16
        if kind == "f" and _is_used(pixels, 1):
            return 0, 1
        raise UnknownRangeError(f"{_described(pixels)}{UNKNOWN} {REMEDY}")


STORED = Levels("stored")
AUTO = Levels("auto")


def _scaled(values: Pixels, low: float, high: float) -> UInt8[np.ndarray, " *shape"]:
    scaled = (np.clip(values.astype(np.float64), low, high) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(scaled, nan=0.0)).astype(np.uint8)


def is_dim(pixels: UInt8[np.ndarray, " *s"]) -> bool:
    """Return whether 16 bits that a library has cut to 8 are likely fewer than 16."""
    return not _is_used(pixels, 255)


def _is_used(pixels: Pixels, white: float) -> bool:
    """Return whether the values keep to 0..white, and reach a good part of it or are all 0."""
    least, largest = pixels.min(), pixels.max()
    return bool(least >= 0 and (_ENOUGH * white < largest <= white or largest == 0))


def _whole(dtype: np.dtype, declared: int | None) -> tuple[float, float]:
    if dtype.kind == "f":
        return 0, 1
    if declared is not None:
        return 0, declared
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def _described(pixels: Pixels) -> str:
    names = {"u": "unsigned", "i": "signed", "f": "float"}
    bits = 8 * pixels.dtype.itemsize
    values = f"{pixels.min():g} to {pixels.max():g}"
    return f"{names.get(pixels.dtype.kind, pixels.dtype.kind)} {bits} bits with values {values}"

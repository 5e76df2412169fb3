"""What callers of `kmeans`, `Whitening` and `EpochPlan` pass: taken as it is meant, or refused.

Lists become arrays, and integers of NumPy are integers. An error names the argument.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.clustering.options import KMeansOptions
from deepclust.clustering.points import Rows
from deepclust.errors import DataError, RecipeError, ResourceError


def as_array(values: Any, name: str) -> Rows:
    """Return an array of real numbers or a tensor, from either of them or from (nested) lists.

    Raises `DataError` naming the argument for anything else.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise DataError(f"{name} holds complex numbers; give its real part, or both as columns")
        if values.layout != torch.strided:
            raise DataError(f"{name} is a sparse tensor; give {name}.to_dense()")
        return values
    if np.ma.is_masked(values):  # an array of NumPy would hold what the mask hides
        raise DataError(f"{name} has masked numbers; leave those rows out, or fill them")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is not an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} holds {array.dtype}, not real numbers; convert it: "
            "numpy.asarray(rows, dtype='float32')"
        )
    return array.astype(np.float64) if array.dtype.itemsize > 8 else array


def as_integer(value: Any, name: str, least: int) -> int:
    """Return an integer of Python, NumPy or torch, or raise `RecipeError` naming the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise RecipeError(f"{name}={value!r} must be an integer") from None
    if number < least or isinstance(value, bool):
        raise RecipeError(f"{name}={value!r} must be an integer of at least {least}")
    return number


def as_device(device: torch.device | str | None) -> torch.device | None:
    """Return a device that is there, or raise what says why it is not."""
    if device is None:
        return None
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(f"device={device!r} is not known; use 'cpu' or 'cuda'") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"device={str(device)!r}: torch sees {torch.cuda.device_count()} GPUs here. Use "
            "device='cpu'."
        )
    return chosen


def check_numbers(options: KMeansOptions) -> None:
    """Raise `RecipeError` naming a number of k-means that is of another type, or too small."""
    for name, least in (("k", 1), ("iterations", 0), ("min_size", 1), ("seed", 0)):
        as_integer(getattr(options, name), name, least)
    tol = options.tol
    if isinstance(tol, bool) or not isinstance(tol, int | float | np.number):
        raise RecipeError(f"tol={tol!r} must be a number")
    if not 0 <= float(tol) < math.inf:
        raise RecipeError(
            f"tol={tol!r} must be a number of at least 0 (0: stop where nothing moves)"
        )

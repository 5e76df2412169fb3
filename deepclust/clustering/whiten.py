"""PCA-whitening, exact and streaming: features [n, D] -> unit rows [n, dim] for k-means.

Source: DeepCluster (Caron et al. 2018), section 3.4: PCA to 256, whitening, L2 normalisation.
Their `faiss.PCAMatrix(eigen_power=-0.5)` is the reference in tests. This differs where it breaks:
the covariance is streamed in float64 about a pivot (no n x D array, no cancellation). Only the
top eigenvectors are solved for. Eigenvalues are clamped as in DeeperCluster, and directions that
the data do not have give zeros instead of NaN, so the shape never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Float32, Float64
from safetensors.numpy import load_file, save
from torch import Tensor

from deepclust.clustering.arguments import as_integer
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.frame import Frame, farthest, frame_of, too_far
from deepclust.clustering.moments import BLOCK, Moments
from deepclust.clustering.points import Rows, unit_rows
from deepclust.clustering.precision import full_precision, own_threads
from deepclust.errors import DataError, NumericalError
from deepclust.files import atomic_file

__all__ = ["Moments", "Whitening", "solve"]

CLAMP = 1e-5  # DeeperCluster's: a direction is never amplified more than 316 times the first one
PIVOT = 256  # rows whose mean is near enough to that of all
RANK_TOLERANCE = 1e-6  # eigenvalues below this share of the largest are float32 rounding


Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Whitening:
    """The map y = normalise((x - mean) @ matrix).

    Columns of `matrix` beyond `rank` are zero. Rows that float32 does not hold are moved
    and scaled first (`frame.py`). Then `mean` is float64, and `matrix` and `eigenvalues` are those
    of (x - mean) * scale.
    """

    mean: Float[np.ndarray, " D"]
    matrix: Float32[np.ndarray, "D dim"]
    eigenvalues: Float32[np.ndarray, " dim"]
    rank: int
    scale: float = 1.0

    def __repr__(self) -> str:
        width, dim = self.matrix.shape
        return f"Whitening({width} to {dim} dimensions, rank {self.rank})"

    @classmethod
    def fit(
        cls,
        x: Rows,
        dim: int = 256,
        progress: Callable[[int, int], None] | None = None,
        device: torch.device | None = None,
    ) -> Whitening:
        """Fit x [n, D] (numpy, memory-mapped or torch; any float type), read in blocks.

        `progress` is called with the rows read so far and n, after every block. `device` computes,
        by default the one where x is.

        Raises `NumericalError` for a row that is not finite (named) or constant features.
        """
        points = ArrayPoints(x, device=device)
        dim = as_integer(dim, "dim", 1)
        frame = frame_of(points.rows)
        points = points.framed(frame)
        points.check_finite()
        if points.n == 0:
            raise DataError("whitening needs at least one row, got an array of 0 rows")
        moments = Moments.zero(points.read_tile(0, PIVOT).double().mean(0))
        for start in range(0, points.n, BLOCK):
            moments.add(points.read_tile(start, BLOCK))
            if progress is not None:
                progress(min(start + BLOCK, points.n), points.n)
        if not bool(torch.isfinite(moments.outer).all()):
            raise NumericalError(too_far(*farthest(points.rows)[:2]))
        return solve(moments, dim) if frame is None else _in_frame(moments, dim, frame)

    def __call__(self, x: Array, device: torch.device | None = None) -> Array:
        """Project x [n, D] to unit rows float32 [n, dim], of x's kind.

        Zero rows stay zero. `device` computes, by default the one where x is.
        """
        points = ArrayPoints(x, device=device)
        if points.dim != len(self.mean):
            raise DataError(
                f"the whitening was fitted on {len(self.mean)} columns, and these rows have "
                f"{points.dim}. Give features of the same backbone."
            )
        mean, matrix = (torch.from_numpy(a).to(points.device) for a in (self.mean, self.matrix))
        if self.mean.dtype == np.float64:
            points, mean = points.framed(Frame(mean, self.scale)), torch.zeros_like(mean).float()
        out = torch.empty(points.n, matrix.shape[1], device=points.device)
        with full_precision():
            for start in range(0, points.n, BLOCK):
                rows = points.read_tile(start, BLOCK)
                out[start : start + len(rows)] = unit_rows((rows - mean) @ matrix)
        return out.to(x.device) if isinstance(x, Tensor) else out.cpu().numpy()

    @property
    def warning(self) -> str | None:
        """A message when the features have fewer directions than asked for, else None."""
        dim = len(self.eigenvalues)
        if self.rank == dim:
            return None
        return (
            f"the features have rank {self.rank}, fewer than the {dim} dimensions asked for; the "
            f"last {dim - self.rank} are zero. Set cluster.dim={self.rank} to save memory, or look "
            f"for dead units in the backbone."
        )

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically.

        `rank` is the number of eigenvalues above zero.
        """
        arrays = {"mean": self.mean, "matrix": self.matrix, "eigenvalues": self.eigenvalues}
        if self.scale != 1:
            arrays["scale"] = np.array(self.scale)
        with atomic_file(path) as partial:
            partial.write_bytes(save(arrays))  # not `save_file`: a full disk must be an OSError

    @classmethod
    def load(cls, path: Path) -> Whitening:
        """Read what `save` wrote."""
        arrays = load_file(path)
        scale = float(arrays.pop("scale", 1.0))
        return cls(**arrays, rank=int(np.count_nonzero(arrays["eigenvalues"])), scale=scale)


def _in_frame(moments: Moments, dim: int, frame: Frame) -> Whitening:
    """Return the whitening of rows x from the moments of (x - origin) * scale."""
    assert frame.origin is not None
    origin = frame.origin.cpu().numpy()
    # what float64 had lost before
    noise = (np.finfo(np.float64).eps * float(np.abs(origin).max()) * frame.scale) ** 2
    inside = solve(moments, dim, noise=noise)
    mean = moments.mean().cpu().numpy() / frame.scale + origin
    return replace(inside, mean=mean, scale=frame.scale)


def solve(
    moments: Moments,
    dim: int,
    clamp: float = CLAMP,
    noise: float = 0.0,
    device: torch.device | None = None,
) -> Whitening:
    """Return the whitening of the rows behind `moments`, always of shape [D, dim].

    Column i is eigenvector i of the covariance over the square root of its eigenvalue. This is
    first raised to `clamp` times the largest if smaller (0: as in FAISS). Signs: the component of
    largest magnitude is positive (ties: the first), so that runs and machines agree. A variance of
    `noise` or less counts as none. `device` solves for the eigenvectors, by default that of the
    moments.

    Raises `NumericalError` if the features are constant or not finite.
    """
    covariance = moments.covariance()
    covariance = covariance.to(device or covariance.device)
    mean = moments.mean().cpu().numpy()
    _check(moments.count, mean, covariance.diagonal().cpu().numpy())
    values, vectors = _top_eigenvectors(covariance, min(dim, len(mean)))
    floor = _rounding(mean) + noise + RANK_TOLERANCE * values[0]
    rank = min(int((values > floor).sum()), moments.count - 1)
    if rank <= 0:
        raise NumericalError(_collapsed(moments.count, values[0]))
    matrix = np.zeros((len(mean), dim), np.float32)
    scales = np.maximum(values[:rank], clamp * values[0]) ** -0.5
    matrix[:, :rank] = _fix_signs(vectors[:, :rank]) * scales
    eigenvalues = np.zeros(dim, np.float32)
    eigenvalues[:rank] = values[:rank]
    return Whitening(mean.astype(np.float32), matrix, eigenvalues, rank)


def _check(count: int, mean: np.ndarray, variances: np.ndarray) -> None:
    if count == 0:
        raise DataError("whitening needs at least one row, and no row was added")
    broken = np.flatnonzero(~np.isfinite(mean + variances))
    if len(broken):
        raise NumericalError(
            f"the moments of {count} feature rows are not finite in {len(broken)} dimensions, "
            f"first {broken[:5].tolist()}. Leave rows with NaN or infinity out before adding them."
        )


def _top_eigenvectors(
    covariance: Float64[Tensor, "D D"], count: int
) -> tuple[Float64[np.ndarray, " count"], Float64[np.ndarray, "D count"]]:
    """Return the largest eigenvalues first; a covariance on the CPU is overwritten."""
    if covariance.device.type == "cpu":
        return _by_lapack(covariance.numpy(), count)
    values, vectors = torch.linalg.eigh(covariance)  # torch has none for the top alone
    return values.flip(0)[:count].cpu().numpy(), vectors.flip(1)[:, :count].cpu().numpy()


def _by_lapack(
    covariance: Float64[np.ndarray, "D D"], count: int
) -> tuple[Float64[np.ndarray, " count"], Float64[np.ndarray, "D count"]]:
    """Return the largest eigenvalues first, and overwrite the covariance, which can be large."""
    size = len(covariance)
    with own_threads():
        values, vectors = scipy.linalg.eigh(
            covariance.T,  # transposed: LAPACK takes columns first, and would be given a copy
            subset_by_index=[size - count, size - 1],
            overwrite_a=True,
            check_finite=False,
        )
    return values[::-1], vectors[:, ::-1]


def _rounding(mean: np.ndarray) -> float:
    """Return the variance that float32 rounding alone gives to constant features."""
    return (float(np.finfo(np.float32).eps) * float(np.abs(mean).max())) ** 2


def _fix_signs(vectors: Float64[np.ndarray, "D d"]) -> Float64[np.ndarray, "D d"]:
    largest = np.abs(vectors).argmax(0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def _collapsed(count: int, variance: float) -> str:
    return (
        f"the {count} feature rows are constant (largest variance {variance:.3g}): the backbone "
        "has collapsed, or every input is the same. Lower the learning rate, start from an earlier "
        "checkpoint, or check the images."
    )

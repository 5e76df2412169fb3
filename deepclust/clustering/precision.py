"""The same digits whatever is set outside: true float32, and as many BLAS threads as torch's.

TF32 keeps 10 bits and flips near-ties. The last digits of a BLAS routine depend on its number of
threads, which the environment chooses (OMP_NUM_THREADS, the cores of a job).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import threadpoolctl
import torch


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products in full float32 inside, whatever is set outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Let NumPy and SciPy use as many threads inside as torch, in a run `train.threads`."""
    with threadpoolctl.threadpool_limits(torch.get_num_threads(), "blas"):
        yield


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let each thread that calls SciPy's BLAS do its product alone, as those of a pass do."""
    with _blas().limit(limits=1):
        yield


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """Return the BLAS libraries of this process; to look for them takes 20 ms."""
    import scipy.linalg.cython_blas  # noqa: F401 - what Numba calls must be loaded before the look

    return threadpoolctl.ThreadpoolController().select(user_api="blas")

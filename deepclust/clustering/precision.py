"""The same digits whatever is set outside: true float32, and as many BLAS threads as torch's.

TF32 keeps 10 bits and flips near-ties. The last digits of a BLAS routine depend on its number of
threads, which the environment chooses (OMP_NUM_THREADS, the cores of a job).
"""

from __future__ import annotations

import contextlib
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

"""A rank in the caller's own process, a notebook perhaps: it leaves everything as it was.

Random states, threads, log handlers, variables and the like belong to the whole process. So there
is one such rank at a time, and the caller has them back after it, also after an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from deepclust.errors import ResourceError

_ONE = threading.Lock()


@contextlib.contextmanager
def borrowed_process() -> Iterator[None]:
    """Use this process for a rank in the block, and leave it as it was.

    Raises `ResourceError` when another rank works in it: both would draw from one random state.
    """
    if not _ONE.acquire(blocking=False):
        raise ResourceError(
            "another run is under way in this process, and both would share its random state and "
            "threads. Wait for its end, or start one of them in another process "
            "(`deepclust pretrain`, or multiprocessing)."
        )
    try:
        with contextlib.ExitStack() as put_back:
            for part in (_random, _gpu, _threads, _logging, _surroundings):
                put_back.enter_context(part())
            yield
    finally:
        _ONE.release()


@contextlib.contextmanager
def _random() -> Iterator[None]:
    python, numbers, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(tensors)


@contextlib.contextmanager
def _gpu() -> Iterator[None]:
    """Put random states and the present device back, where the caller uses GPUs."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield
        return
    states, device = torch.cuda.get_rng_state_all(), torch.cuda.current_device()
    try:
        yield
    finally:
        torch.cuda.set_rng_state_all(states)
        torch.cuda.set_device(device)


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    count, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    tries = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.set_num_threads(count)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = tries


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Close the handlers that the rank has added."""
    logger = logging.getLogger("deepclust")
    handlers, level = list(logger.handlers), logger.level
    try:
        yield
    finally:
        for handler in [one for one in logger.handlers if one not in handlers]:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Put the variables of the environment and the present folder back."""
    variables, folder = dict(os.environ), Path.cwd()
    try:
        yield
    finally:
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)
        os.chdir(folder)

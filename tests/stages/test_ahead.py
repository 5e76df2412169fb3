"""Batches made ahead come in order, and an error waits for those before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from deepclust.data.read.loader import Loaded
from deepclust.methods.base import Batch
from deepclust.stages.ahead import DEPTH, Ahead
from tests.pretended_device import CARD, pretended


def loaded(count: int, taken: list[int], *, fails: bool = False) -> Iterator[Loaded]:
    for number in range(count):
        taken.append(number)
        yield Loaded((), np.array([number]), np.array([number]))
    if fails:
        raise OSError("the storage is gone")


def make(one: Loaded) -> Batch:
    none: Any = torch.zeros(0)
    return Batch(torch.from_numpy(one.sample_ids), (), none, none, none)


@pytest.mark.parametrize(("device", "ahead"), [(torch.device("cpu"), 0), (CARD, DEPTH)])
def test_batches_come_in_order_and_on_a_gpu_the_next_are_begun(
    device: torch.device, ahead: int
) -> None:
    taken: list[int] = []
    with pretended():
        for number, ready in enumerate(Ahead(loaded(6, taken), make, device)):
            assert ready.batch.sample_ids.tolist() == [number]
            assert len(taken) == min(6, number + 1 + ahead)
    assert len(taken) == 6


def test_an_error_waits_for_the_batches_before_it() -> None:
    with pretended():
        batches = Ahead(loaded(3, [], fails=True), make, CARD)
        assert [next(batches).batch.sample_ids.item() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="storage"):
            next(batches)


def test_images_of_an_extraction_are_begun_ahead_too() -> None:
    taken: list[int] = []
    with pretended():
        send = Ahead(loaded(4, taken), lambda one: torch.from_numpy(one.sample_ids).to(CARD), CARD)
        assert next(send).batch.tolist() == [0]
        assert len(taken) == 1 + DEPTH
        assert [ready.batch.item() for ready in send] == [1, 2, 3]

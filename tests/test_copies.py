"""Copies between a GPU and the host, on the pretended device: how often they wait."""

from __future__ import annotations

import torch

from deepclust.copies import snapshot, to_host
from tests.pretended_device import pretended


def test_all_tensors_of_a_checkpoint_come_from_the_card_with_one_wait() -> None:
    values = [torch.arange(4.0) + i for i in range(20)]
    with pretended() as log:
        there = [value.to("cuda") for value in values]
        before = log.count("other")
        copies = snapshot([*there, torch.ones(2)])
        assert log.count("other") - before == 1
    assert all(torch.equal(copy, value) for copy, value in zip(copies, values, strict=False))
    assert all(not copy.is_cuda for copy in copies)


def test_a_snapshot_is_not_what_was_copied() -> None:
    value = torch.zeros(3)
    (copy,) = snapshot([value])
    value.fill_(1)
    assert copy.tolist() == [0, 0, 0]


def test_what_is_on_the_host_already_is_not_copied() -> None:
    value = torch.zeros(3)
    assert to_host(value)[0] is value

"""Crops on a device have the bits of the CPU's; Triton's kernel runs in its interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepclust.data.images.crops import CentreCrop, RandomResizedCrop
from deepclust.data.images.device_crops import Cut, Packed, crop, cut_of, pack, taps
from tests.forks import in_fork
from tests.launches import launches

VIEWS = (RandomResizedCrop(24), CentreCrop(20, 28), CentreCrop(24, 24), RandomResizedCrop(9))


def image(height: int, width: int, seed: int) -> Tensor:
    """Noise over a ramp with hard edges, channels last in memory as a decoded JPEG."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    noise[: height // 2, width // 3 :] = torch.tensor([0, 255, 128], dtype=torch.uint8)
    return noise.permute(2, 0, 1)


def on_the_cpu(images: list[Tensor], view: Any, quarters: list[int]) -> Tensor:
    draws = view.draws(7, np.arange(len(images)))
    crops = (view(one, draw) for one, draw in zip(images, draws, strict=True))
    return torch.stack([c.rot90(q, (1, 2)) for c, q in zip(crops, quarters, strict=True)])


def packed(images: list[Tensor], view: Any, quarters: list[int]) -> Packed:
    draws = view.draws(7, np.arange(len(images)))
    cuts = [cut_of(view, *x.shape[1:], draw) for x, draw in zip(images, draws, strict=True)]
    return pack(images, cuts, view.size, quarters)


@given(
    sides=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4),
    view=st.sampled_from(VIEWS),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_crops_in_integers_have_the_bits_of_the_cpus(sides: Any, view: Any, seed: int) -> None:
    images = [image(h, w, seed) for h, w in sides]
    quarters = [(seed + i) % 4 for i in range(len(images))]
    made = crop(packed(images, view, quarters))
    torch.testing.assert_close(made, on_the_cpu(images, view, quarters), rtol=0, atol=0)


def test_planes_that_lie_apart_in_memory_are_packed_too() -> None:
    images = [image(40, 50, 0).contiguous(), image(90, 31, 1)[:, 3:80:2, 1:]]
    made = crop(packed(images, VIEWS[0], [0, 0]))
    torch.testing.assert_close(made, on_the_cpu(images, VIEWS[0], [0, 0]), rtol=0, atol=0)


def test_an_axis_that_keeps_its_size_keeps_its_pixels() -> None:
    kept = taps(37, 37)
    np.testing.assert_array_equal(kept.first, np.arange(37))
    assert set(kept.weights[:, 0].tolist()) == {1 << kept.shift}
    assert not kept.weights[:, 1:].any()


def test_a_view_that_no_device_can_cut_is_named() -> None:
    with pytest.raises(TypeError, match="str cannot be cut"):
        cut_of("view", 3, 3, None)


def by_the_kernel(work: Packed) -> Tensor:
    from deepclust.data.images.crop_kernel import crop_by_triton

    return crop_by_triton(work)


def kernel_and_cpu() -> list[tuple[Tensor, Tensor]]:
    images = [image(h, w, h) for h, w in ((9, 12), (11, 7), (1, 4), (3, 3))]
    results = []
    for view, quarters in ((RandomResizedCrop(5), [0, 1, 2, 3]), (CentreCrop(3, 5), [3, 2, 1, 0])):
        made = by_the_kernel(packed(images, view, quarters))
        results.append((made, on_the_cpu(images, view, quarters)))
    flipped = pack(images[:1], [Cut((2, 3, 7, 9), (4, 4), (0, 0), True)], 4)
    return [*results, (by_the_kernel(flipped), crop(flipped))]


def test_the_kernel_has_the_bits_of_the_cpus_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for made, expected in in_fork(kernel_and_cpu):
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


def launched_crop() -> tuple[dict[str, list[tuple[int, ...]]], tuple[int, ...]]:
    from deepclust.data.images import crop_kernel

    work = packed([image(9, 12, 0)], RandomResizedCrop(5), [0])
    with launches(crop_kernel, "_crop") as seen:
        crop_kernel.crop_by_triton(work)
    return seen, tuple(work.pixels.shape)


def test_the_kernel_is_launched_on_the_card_of_the_pixels() -> None:
    pytest.importorskip("triton")
    seen, shape = in_fork(launched_crop)
    assert seen == {"_crop": [shape]}

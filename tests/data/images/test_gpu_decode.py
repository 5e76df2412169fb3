"""JPEGs that a GPU decodes: grouped, decoded in one call, and one that fails touches no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepclust.data.images import gpu_decode
from deepclust.data.images.crops import CentreCrop, RandomResizedCrop
from deepclust.data.images.decode import decode
from deepclust.data.images.device_crops import Boxes, Jpeg
from deepclust.data.images.gpu_decode import Encoded, check, decode_each, decoded_crops
from deepclust.data.images.headers import Size
from deepclust.errors import ResourceError
from tests.cpu_for_gpu import cpu_for_gpu, decode_by_cpu
from tests.images import draw, encode
from tests.pretended_device import CARD, pretended

VIEWS: tuple[Any, ...] = (RandomResizedCrop(12), CentreCrop(8, 9))


def jpeg(seed: int, height: int = 24, width: int = 32) -> Jpeg:
    return Jpeg(encode(draw(seed, height, width), "jpg"), Size(height, width))


def crops_of(images: list[Any], arena: int) -> tuple[list[Tensor], list[tuple[int, str]]]:
    """The crops of a batch as a rank makes them, back on the CPU, and what failed."""
    boxes = [Boxes.black(len(images), view.size) for view in VIEWS]
    for view, own in zip(VIEWS, boxes, strict=True):
        for row, draw_ in enumerate(view.draws(5, np.arange(len(images)))):
            own.put(row, images[row], view, draw_)
    before, gpu_decode.ARENA = gpu_decode.ARENA, arena
    try:
        encoded = Encoded.of(images)
    finally:
        gpu_decode.ARENA = before
    with pretended(), cpu_for_gpu():
        packed = [own.pack(encoded.starts) for own in boxes]
        made, failed = decoded_crops(packed, encoded, CARD)
        return [crops.cpu() for crops in made], failed


def by_the_cpu(images: list[Any]) -> list[Tensor]:
    whole = [decode(one.data) if isinstance(one, Jpeg) else one for one in images]
    draws = [view.draws(5, np.arange(len(images))) for view in VIEWS]
    return [
        torch.stack([view(one, drawn) for one, drawn in zip(whole, own, strict=True)])
        for view, own in zip(VIEWS, draws, strict=True)
    ]


@given(
    sides=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 60), st.booleans()), min_size=1, max_size=6
    ),
    arena=st.sampled_from([1, 5000, 2**29]),
)
@settings(max_examples=25, deadline=None)
def test_crops_are_those_of_the_cpu_whoever_decodes_and_how_many_at_a_time(
    sides: list[tuple[int, int, bool]], arena: int
) -> None:
    images = [
        jpeg(i, h, w) if is_jpeg else draw(i, h, w) for i, (h, w, is_jpeg) in enumerate(sides)
    ]
    made, failed = crops_of(images, arena)
    assert failed == []
    for one, expected in zip(made, by_the_cpu(images), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_a_file_that_nobody_can_decode_is_black_and_touches_no_other() -> None:
    images = [jpeg(0), Jpeg(b"\xff\xd8 no image \xff\xd9", Size(9, 9)), jpeg(2), draw(3)]
    good = by_the_cpu([images[0], draw(1), *images[2:]])
    for arena in (1, 2**29):
        made, failed = crops_of(images, arena)
        assert [row for row, _ in failed] == [1]
        assert "damaged" in failed[0][1]
        for one, expected in zip(made, good, strict=True):
            assert not one[1].any()
            assert torch.equal(one[[0, 2, 3]], expected[[0, 2, 3]])


def files(images: Sequence[Jpeg]) -> list[Tensor]:
    return Encoded.of(images).files()


def test_what_the_card_refuses_is_decoded_by_the_cpu_alone() -> None:
    asked: list[int] = []

    def refuses_the_second(given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        asked.append(len(given))
        if any(torch.equal(file, second) for file in given):
            raise RuntimeError("Error while decoding JPEG images: Failed to get image info: 3")
        return [image + 1 for image in decode_by_cpu(given, device)]

    images = [jpeg(i) for i in range(3)]
    own = files(images)
    second = own[1]
    with pretended(), cpu_for_gpu(refuses_the_second):
        decoded = [one.cpu() for one in decode_each(own, [one.size for one in images], CARD)]
    assert asked == [3, 1, 1, 1]
    for i, one in enumerate(decoded):
        assert torch.equal(one, decode(images[i].data) + (i != 1))


def test_an_image_of_another_size_than_its_header_says_is_no_image() -> None:
    with pretended(), cpu_for_gpu():
        (reason,) = decode_each(files([jpeg(0)]), [Size(7, 7)], CARD)
    assert reason == "decoded as (24, 32), and its header says (7, 7)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("CUDA out of memory. Tried to allocate", "lower train.batch"),
        ("Error while decoding JPEG images: Failed to decode batch: 5", "lower train.batch"),
        ("CUDA error: an illegal memory access", "the GPU's JPEG decoder failed"),
        ("decode_jpegs_cuda: torchvision not compiled with nvJPEG support", "data.decode=cpu"),
    ],
)
def test_a_failure_of_the_card_is_no_fault_of_an_image(text: str, says: str) -> None:
    def fails(given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        raise RuntimeError(text)

    with pretended(), cpu_for_gpu(fails), pytest.raises(ResourceError, match=says):
        decode_each(files([jpeg(0)]), [Size(24, 32)], CARD)


def test_without_a_gpu_the_error_names_the_key_and_what_to_do() -> None:
    with pytest.raises(ResourceError, match=r"data\.decode=gpu .* new run with data\.decode=cpu"):
        check(torch.device("cpu"))
    with pretended():
        assert check(None) == CARD


@pytest.mark.gpu
def test_a_gpu_decodes_nearly_as_the_cpu_does_and_the_same_however_batches_are_cut() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = check(None)
    pictures = [draw(i, 40 + 7 * i, 90 - 5 * i) for i in range(12)]
    # with less chroma its colours differ at edges
    images = [
        Jpeg(encode(one, "jpg", subsampling=0), Size(one.shape[1], one.shape[2]))
        for one in pictures
    ]
    sizes = [one.size for one in images]
    whole = decode_each(files(images), sizes, device)
    for i, one in enumerate(whole):
        assert isinstance(one, Tensor)
        off = (one.cpu().int() - decode(images[i].data).int()).abs()
        assert off.max() <= 4
        assert off.float().mean() < 0.3
        assert torch.equal(decode_each(files(images[i : i + 1]), sizes[i : i + 1], device)[0], one)

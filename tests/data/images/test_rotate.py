from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.data.images.rotate import quarters, rotate


def pictures(count: int, side: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def test_every_image_is_turned_counter_clockwise_as_numpys():
    images, turns = pictures(40), torch.arange(40) * 7 % 4
    expected = [np.rot90(x, q, (1, 2)) for x, q in zip(images.numpy(), turns.tolist(), strict=True)]
    assert np.array_equal(rotate(images, turns), np.stack(expected))


def test_a_quarter_moves_the_right_edge_to_the_top():
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[..., -1] = 9
    turned = rotate(image, torch.tensor([1]))
    assert (turned[:, :, 0] == 9).all()
    assert (turned[:, :, 1:] == 0).all()


def test_turning_back_gives_the_image_and_leaves_the_argument_alone():
    images, turns = pictures(30, 8), torch.randint(0, 4, (30,))
    before = images.clone()
    assert torch.equal(rotate(rotate(images, turns), 4 - turns), images)
    assert torch.equal(images, before)
    assert rotate(images, 0 * turns).data_ptr() != images.data_ptr()


def test_channels_last_and_slices_are_turned_as_well():
    images, turns = pictures(9, 8), torch.arange(9)
    expected = rotate(images, turns)
    assert torch.equal(rotate(images.to(memory_format=torch.channels_last), turns), expected)
    assert torch.equal(rotate(images[::2, :, 1:7, 1:7], turns[::2]), expected[::2, :, 1:7, 1:7])


def test_empty_batches_and_images_of_one_pixel_are_rotated():
    assert rotate(pictures(0), torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 5, 5)
    one = pictures(4, 1)
    assert torch.equal(rotate(one, torch.arange(4)), one)


def test_quarters_depend_on_key_and_position_alone_and_all_are_as_likely():
    together = quarters(7, np.arange(8000), 4)
    assert np.array_equal(quarters(7, np.arange(5000, 5100), 4), together[5000:5100])
    assert not np.array_equal(quarters(8, np.arange(8000), 4), together)
    assert abs(np.bincount(together, minlength=4) / 2000 - 1).max() < 0.1


def test_of_one_quarter_none_is_turned():
    assert quarters(3, np.arange(100), 1).sum() == 0
    assert len(quarters(3, np.arange(0), 4)) == 0


@pytest.mark.gpu
def test_a_gpu_turns_the_same_wherever_the_quarters_lie():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images, turns = pictures(40), torch.arange(40) % 4
    for there in (turns, turns.cuda()):
        assert torch.equal(rotate(images.cuda(), there).cpu(), rotate(images, turns))

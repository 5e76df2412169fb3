"""Small numbers reach a device as they are, and the host waits for none of them."""

from __future__ import annotations

import numpy as np
import torch

from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import to_float
from deepclust.data.images.rotate import rotate
from deepclust.data.to_device import constant, send
from tests.pretended_device import CARD, pretended

ARRAYS = [
    np.arange(5),
    np.zeros((0, 3), np.int32),
    np.ones((2, 3), np.float32).T,
    np.array([True, False]),
]


def test_arrays_of_any_type_and_shape_travel_in_one_block() -> None:
    with pretended() as log:
        sent = send(ARRAYS, CARD)
        assert log.count("other") == 0
        for array, tensor in zip(ARRAYS, sent, strict=True):
            assert tensor.is_cuda
            assert np.array_equal(tensor.cpu().numpy(), array)
            assert tensor.dtype == torch.from_numpy(array).dtype


def test_a_constant_is_copied_once_and_may_be_made_without_gradients() -> None:
    with torch.inference_mode():
        values = constant((0, 1.5), torch.device("cpu"))
    assert values.tolist() == [0.0, 1.5]
    assert not values.is_inference()
    assert constant([0, 1.5], torch.device("cpu")) is values


def test_views_are_made_on_the_device_without_a_wait_and_are_those_of_the_cpu() -> None:
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    colour = Colour((0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarise=0.2)
    draws, quarters = colour.draws(3, np.arange(6)), torch.arange(6)

    def views(given: torch.Tensor) -> torch.Tensor:
        return to_float(rotate(colour(given, draws), quarters), (0.5,) * 3, (0.2, 0.3, 0.4))

    expected = views(images)
    with pretended() as log:
        there = images.pin_memory().to("cuda", non_blocking=True)
        views(there)  # constants are copied
        before = log.count("other")
        again = views(there)
        assert log.count("other") == before
        torch.testing.assert_close(again.cpu(), expected)

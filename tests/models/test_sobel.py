"""The Sobel input against a filter written with loops, and its invariances."""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust.models import build_backbone
from deepclust.models.sobel import HORIZONTAL, VERTICAL, Sobel


def slow_sobel(image: Tensor) -> Tensor:
    """Correlation of the zero-padded grey image with the two filters, pixel by pixel."""
    grey = (image[0] + image[1] + image[2]) / 3
    height, width = grey.shape
    edges = torch.zeros(2, height, width)
    for channel, weights in enumerate((HORIZONTAL, VERTICAL)):
        for y in range(height):
            for x in range(width):
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < height and 0 <= x + dx < width:
                            pixel = grey[y + dy, x + dx]
                            edges[channel, y, x] += weights[dy + 1][dx + 1] * pixel
    return edges


def test_sobel_equals_the_slow_filter() -> None:
    images = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([slow_sobel(image) for image in images])
    assert torch.allclose(Sobel()(images), expected, atol=1e-5)


def test_a_constant_image_has_no_edges_inside_and_colour_does_not_count() -> None:
    assert not Sobel()(torch.full((1, 3, 8, 8), 2.0))[:, :, 1:-1, 1:-1].any()
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Sobel()(images), Sobel()(images.flip(1)), atol=1e-6)


def test_sobel_is_frozen_and_outside_the_state() -> None:
    backbone = build_backbone("conv4", sobel=True, image_size=16)
    assert backbone.sobel is not None
    assert not list(backbone.sobel.parameters())
    assert not any("filters" in key for key in backbone.state_dict())
    assert backbone.to("meta").sobel.filters.is_meta


def test_edges_are_float32_under_autocast() -> None:
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        edges = Sobel()(images)
    assert torch.equal(edges, Sobel()(images))

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from deepclust.data.images.colour import Colour, blur_images, turn_hue
from deepclust.errors import RecipeError

SIMCLR = Colour((0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5)
NAMES = ("brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarise")
NEUTRAL = dict(zip(NAMES, (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0), strict=True))
JITTERS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)


def pictures(count: int, side: int = 32) -> Tensor:
    """Noise, but the first is black, the second white, the third smooth."""
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    ramp = torch.linspace(0, 255, side)
    images[2] = torch.stack(
        [ramp.expand(side, side), ramp[:, None].expand(side, side), ramp + 0 * ramp[:, None]]
    )
    return images


def drawn(order: tuple[int, ...] = (0, 1, 2, 3), **changes: float) -> list[float]:
    return [*order, *({**NEUTRAL, **changes}[name] for name in NAMES)]


def reference(image: Tensor, draw: list[float]) -> Tensor:
    """torchvision's operations on one float image in [0, 1], in the draw's order."""
    for jitter in draw[:4]:
        image = JITTERS[int(jitter)](image, draw[4 + int(jitter)])
    if draw[8]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if draw[9]:
        kernel = 2 * max(1, image.shape[-1] // 20) + 1
        image = F.gaussian_blur(image, [kernel, kernel], [draw[9], draw[9]])
    return image


def levels(images: Tensor, expected: Tensor) -> Tensor:
    return (images.int() - expected.int()).abs()


@pytest.mark.parametrize(
    "change",
    [{"brightness": b} for b in (0.0, 0.3, 1.7)]
    + [{"contrast": c} for c in (0.0, 0.4, 1.8)]
    + [{"saturation": s} for s in (0.0, 0.5, 2.0)]
    + [{"hue": h} for h in (-0.5, -0.17, 0.02, 0.25, 0.5)]
    + [{"grey": 1.0}, {"sigma": 0.1}, {"sigma": 0.9}, {"sigma": 2.0}],
    ids=str,
)
def test_each_change_is_torchvisions(change):
    images, draw = pictures(6, side=64), drawn(**change)
    ours = SIMCLR(images, np.array([draw] * 6))
    exact = reference(images / 255, draw) * 255
    assert (ours - exact).abs().max() < 0.502  # it is rounded, and nothing else
    assert levels(ours, reference(images, draw)).max() <= 2  # torchvision cuts uint8 off


def test_solarisation_is_torchvisions():
    images = pictures(6)
    ours = SIMCLR(images, np.array([drawn(solarise=1.0)] * 6))
    assert torch.equal(ours, F.solarize(images, 128))


def test_solarisation_has_its_probability_and_moves_no_other_draw():
    positions = np.arange(4000)
    plain, some = SIMCLR.draws(3, positions), replace(SIMCLR, solarise=0.2).draws(3, positions)
    assert np.array_equal(plain[:, :10], some[:, :10])
    assert not plain[:, 10].any()
    assert some[:, 10].mean() == pytest.approx(0.2, abs=0.02)
    assert not Colour(solarise=0.1).does_nothing


def test_a_chain_in_any_order_is_torchvisions():
    orders = list(permutations(range(4)))
    values = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.5, "hue": -0.2}
    draws = [drawn(order, **values, sigma=0.8, grey=i % 5 == 0) for i, order in enumerate(orders)]
    images = pictures(len(draws), side=40)
    ours = SIMCLR(images, np.array(draws))
    exact = torch.stack([reference(x, d) for x, d in zip(images / 255, draws, strict=True)])
    assert (ours - exact * 255).abs().max() < 0.51
    theirs = torch.stack([reference(x, d) for x, d in zip(images, draws, strict=True)])
    assert levels(ours, theirs).float().mean() < 2


def test_a_row_depends_on_nothing_but_its_own_draw():
    images, draws = pictures(70, side=64), SIMCLR.draws(5, np.arange(70))
    together = SIMCLR(images, draws)
    assert torch.equal(SIMCLR(images, draws), together)
    order = np.random.default_rng(0).permutation(70)
    assert torch.equal(SIMCLR(images[order], draws[order]), together[order])
    alone = torch.cat([SIMCLR(images[i : i + 1], draws[i : i + 1]) for i in range(70)])
    assert levels(alone, together).max() <= 1
    assert levels(alone, together).float().mean() < 1e-4


def test_a_draw_depends_on_its_key_and_position_alone():
    together = SIMCLR.draws(7, np.arange(100, 200))
    assert np.array_equal(SIMCLR.draws(7, np.array([150])), together[50:51])
    assert not np.array_equal(SIMCLR.draws(8, np.array([150])), together[50:51])


def test_draws_are_distributed_as_torchvisions():
    n = 20_000
    strong = Colour((0.4, 1.5, 0.2, 0.1), jitter_p=0.7, grey=0.2, blur=0.4, blur_sigma=(0.5, 1.5))
    draws = strong.draws(3, np.arange(n))
    jittered = draws[(draws[:, 4:8] != [1, 1, 1, 0]).any(axis=1)]
    assert abs(len(jittered) / n - 0.7) < 0.02
    low, high = [0.6, 0, 0.8, -0.1], [1.4, 2.5, 1.2, 0.1]
    spread = (jittered[:, 4:8] - low) / np.subtract(high, low)
    assert 0 <= spread.min() <= spread.max() < 1
    assert abs(spread.mean(axis=0) - 0.5).max() < 0.01
    orders, counts = np.unique(draws[:, :4], axis=0, return_counts=True)
    assert len(orders) == 24
    assert abs(counts / n * 24 - 1).max() < 0.15
    assert abs(draws[:, 8].mean() - 0.2) < 0.01
    sigma = draws[draws[:, 9] > 0, 9]
    assert abs(len(sigma) / n - 0.4) < 0.02
    assert 0.5 <= sigma.min() < 0.51 < 1.49 < sigma.max() <= 1.5


def test_batches_look_on_average_as_torchvisions():
    torch.manual_seed(0)
    theirs = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    image = pictures(3)[2]
    ours = Colour((0.4, 0.4, 0.2, 0.1), jitter_p=1.0)
    many = ours(image.expand(2000, -1, -1, -1), ours.draws(1, np.arange(2000))).float()
    reference = torch.stack([theirs(image) for _ in range(2000)]).float()
    assert (many.mean(0) - reference.mean(0)).abs().max() < 6
    assert (many.std(0) - reference.std(0)).abs().max() < 6


def test_a_third_of_the_circle_moves_every_channel_to_the_next():
    x = torch.rand(4, 3, 8, 8) * 255
    third = torch.full((4, 1, 1, 1), 1 / 3)
    torch.testing.assert_close(turn_hue(x, third), x.roll(1, dims=1), atol=1e-3, rtol=0)
    torch.testing.assert_close(turn_hue(x, -third), x.roll(-1, dims=1), atol=1e-3, rtol=0)
    torch.testing.assert_close(turn_hue(x, 0 * third), x, atol=1e-3, rtol=0)


def test_a_blur_keeps_what_is_even_and_the_whole_amount_of_light():
    sigma = torch.tensor([0.1, 1.0, 5.0])[:, None, None, None]
    even = torch.full((3, 3, 30, 30), 77.0)
    torch.testing.assert_close(blur_images(even, sigma), even)
    spot = torch.zeros(3, 3, 30, 30)
    spot[:, :, 15, 15] = 255.0
    light = blur_images(spot, sigma)
    torch.testing.assert_close(light.sum((2, 3)), spot.sum((2, 3)))
    assert light[0, 0, 15, 15] > light[1, 0, 15, 15] > light[2, 0, 15, 15]


def test_images_that_nothing_is_drawn_for_stay_as_they_are():
    images = pictures(50)
    for still in (Colour(), Colour((0.4, 0.4, 0.4, 0.4), jitter_p=0.0), Colour((0, 0, 0, 0), 1.0)):
        assert still.does_nothing
        assert torch.equal(still(images, still.draws(0, np.arange(50))), images)
    assert torch.equal(SIMCLR(images, np.array([drawn()] * 50)), images)


def test_colour_changes_are_not_reported_as_doing_nothing():
    assert not SIMCLR.does_nothing
    assert not Colour(grey=0.1).does_nothing
    assert not Colour(blur=0.1).does_nothing
    assert not Colour((0.0, 0.0, 0.0, 0.1)).does_nothing


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_tiny_images_and_empty_batches_keep_their_shape(side):
    colour = Colour((0.4, 0.4, 0.4, 0.5), 1.0, 0.5, 1.0)
    for count in (0, 1, 3):
        images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        assert colour(images, colour.draws(0, np.arange(count))).shape == images.shape


@pytest.mark.gpu
def test_a_gpu_gives_the_same_up_to_rounding():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images, draws = pictures(300, side=64), SIMCLR.draws(5, np.arange(300))
    there = SIMCLR(images.cuda(), draws)
    assert there.is_cuda
    assert levels(there.cpu(), SIMCLR(images, draws)).max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"jitter": (0.1, 0.1, -0.1, 0.1)},
        {"jitter": (0.1, 0.1, 0.1, 0.6)},
        {"jitter_p": 1.1},
        {"grey": -0.1},
        {"blur": 2.0},
        {"blur_sigma": (0.0, 1.0)},
        {"blur_sigma": (2.0, 1.0)},
    ],
    ids=str,
)
def test_impossible_settings_of_colour_are_refused(wrong):
    with pytest.raises(RecipeError):
        Colour(**wrong)

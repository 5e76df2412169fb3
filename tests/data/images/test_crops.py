from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from deepclust.data.images.crops import CentreCrop, RandomResizedCrop, to_float
from deepclust.data.images.draws import uniform
from deepclust.errors import RecipeError


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def decoded(height: int, width: int) -> torch.Tensor:
    """An image in the channels-last layout that decoders give."""
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(60, 90), (91, 60), (33, 33), (200, 51), (17, 90)])
@pytest.mark.parametrize("make", [picture, decoded])
def test_a_centre_crop_is_torchvisions(shape, make):
    image = make(*shape)
    expected = v2.CenterCrop(32)(v2.Resize(40)(image))
    assert torch.equal(CentreCrop(32, 40)(image), expected)


def test_an_image_of_the_right_side_is_cropped_without_a_resize():
    image = picture(32, 32)
    assert torch.equal(CentreCrop(32, 32)(image), image)
    assert torch.equal(CentreCrop(28, 32)(image), image[:, 2:30, 2:30])


def test_a_very_long_image_does_not_explode():
    assert CentreCrop(224, 256)(picture(1, 60_000)).shape == (3, 224, 224)
    view = RandomResizedCrop(224)
    assert view(picture(60_000, 1), view.draws(0, np.array([0]))[0]).shape == (3, 224, 224)


@pytest.mark.parametrize("image", [picture(60, 90), decoded(60, 90), decoded(70, 95)[:, 4:64, 5:]])
def test_a_random_crop_is_torchvisions_resize_of_its_box(image):
    view = RandomResizedCrop(24, flip=0.5)
    flips = 0
    for draw in view.draws(5, np.arange(20)):
        top, left, height, width = view.box(60, 90, draw)
        expected = v2.functional.resized_crop(image, top, left, height, width, [24, 24])
        expected = expected.flip(-1) if draw[-1] else expected
        assert torch.equal(view(image, draw), expected)
        flips += draw[-1]
    assert 2 < flips < 18


@pytest.mark.parametrize("shape", [(375, 500), (28, 28), (400, 60)])
def test_areas_ratios_and_places_are_distributed_as_torchvisions(shape):
    stats = pytest.importorskip("scipy.stats")
    view, n = RandomResizedCrop(24), 3000
    ours = np.array([view.box(*shape, draw) for draw in view.draws(1, np.arange(n))])
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(24)
    blank = torch.zeros((1, *shape), dtype=torch.uint8)
    drawn = [reference.make_params([blank]) for _ in range(n)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    for boxes in (ours, theirs):
        assert ((boxes[:, :2] >= 0) & (boxes[:, :2] + boxes[:, 2:] <= shape)).all()
    for of in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-3


def test_when_ten_tries_fail_the_largest_allowed_centre_is_taken():
    view = RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    draw = view.draws(0, np.array([0]))[0]
    assert view.box(20, 100, draw) == (0, 36, 20, 27)  # width = round(20 * 4 / 3)
    assert view.box(100, 20, draw) == (36, 0, 27, 20)
    assert view.box(1, 1, draw) == (0, 0, 1, 1)


def test_a_draw_depends_on_its_key_and_position_alone():
    view = RandomResizedCrop(24)
    together = view.draws(7, np.arange(100, 200))
    assert view.draws(7, np.array([150])) == together[50:51]
    assert view.draws(7, np.arange(199, 99, -1))[::-1] == together
    assert view.draws(8, np.array([150])) != together[50:51]


def test_the_hash_is_uniform_and_its_columns_are_independent():
    u = uniform(11, np.arange(20_000), 8)
    assert 0 <= u.min() <= u.max() < 1
    assert abs(u.mean(axis=0) - 0.5).max() < 0.01
    assert abs(u.var(axis=0) - 1 / 12).max() < 0.002
    columns = np.hstack([u[:-1], u[1:], uniform(12, np.arange(19_999), 8)])
    assert abs(np.corrcoef(columns.T) - np.eye(24)).max() < 0.03


def test_to_float_normalises_per_channel():
    images = torch.stack([picture(5, 6), picture(5, 6)])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = v2.functional.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(to_float(images, mean, std), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CentreCrop(32, 31),
        lambda: CentreCrop(0, 31),
        lambda: RandomResizedCrop(0),
        lambda: RandomResizedCrop(8, flip=1.5),
        lambda: RandomResizedCrop(8, scale=(0.5, 0.1)),
    ],
)
def test_impossible_settings_of_a_view_are_refused(wrong):
    with pytest.raises(RecipeError):
        wrong()

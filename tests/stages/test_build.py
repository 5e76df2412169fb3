"""What the parts of training are on a GPU: norms, autocast, gradients that meet once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deepclust.methods import embed
from deepclust.methods.embed import has_bf16
from deepclust.methods.simclr.method import nt_xent
from deepclust.recipe import Recipe
from deepclust.recipe.sections import TrainSection
from deepclust.stages.build import synchronised
from deepclust.stages.train import forward_backward, no_sync
from deepclust.world import ALONE

FAMILIES = ("efficientnet_b0", "mobilenetv3_small_050", "regnety_002", "resnetv2_50d",
            "densenet121", "resnet18")  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_over_all_ranks_keep_the_features_of_every_family(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network: Any = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = network(images)
        after = synchronised(network)(images)
    torch.testing.assert_close(after, before)


def test_what_is_float32_under_autocast_has_gradients_of_float32() -> None:
    random = torch.Generator().manual_seed(0)
    rows = [torch.randn(64, 32, generator=random).requires_grad_() for _ in range(2)]
    wide = [row.detach().double().requires_grad_() for row in rows]
    nt_xent(*wide, ALONE, 0.1).backward()
    trainer: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=TrainSection(epochs=1, precision="bf16")),
        world=ALONE,
        model=lambda batch: {"loss": nt_xent(*rows, ALONE, 0.1)},
    )
    forward_backward(trainer, SimpleNamespace(), last=True)  # type: ignore[arg-type]
    for row, exact in zip(rows, wide, strict=True):
        error = (row.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 1e-5


def test_gradients_of_a_compiled_model_meet_at_the_last_part_only() -> None:
    kept: list[str] = []

    class Ranks(nn.Module):
        @contextlib.contextmanager
        def no_sync(self) -> Iterator[None]:
            kept.append("kept")
            yield

    for meet in (False, True):
        with no_sync(torch.compile(Ranks()), meet):
            pass
    assert kept == ["kept"]


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_bf16_is_the_default_where_a_gpu_has_it(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bf16.cache_clear()
    monkeypatch.setattr(embed.torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bf16(torch.device("cuda", 0)) is expected
    assert not has_bf16(torch.device("cpu"))
    has_bf16.cache_clear()


def test_batch_norm_is_per_rank_unless_a_recipe_says_otherwise() -> None:
    assert TrainSection(epochs=1).sync_bn == "off"
    assert Recipe.load("deepcluster-resnet50-imagenet").train.sync_bn == "off"
    assert Recipe.load("byol-resnet50-imagenet").train.sync_bn == "auto"

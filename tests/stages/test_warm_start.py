"""A run starts from the backbone of another one, whatever the methods of the two are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from deepclust import pretrain
from deepclust.errors import DataError
from deepclust.methods import METHODS
from deepclust.models import build_backbone
from deepclust.models.backbone import Backbone
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run
from deepclust.run.labels import class_names
from deepclust.stages.build import build_method
from deepclust.stages.warm_start import load_weights, other_normalisation
from deepclust.world import ALONE
from tests.methods.cases import CASES, NAMES_OF
from tests.tiny import final_weights, tiny_recipe


@pytest.fixture(scope="module")
def byol(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a method that has a teacher beside the backbone that counts."""
    run = tmp_path_factory.mktemp("runs") / "byol"
    pretrain(tiny_recipe(shards, "method.name=byol", *CASES["byol"], "train.epochs=1"), run)
    return run


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_starts_from_another_ones_backbone(
    name: str, byol: Path, shards: Path
) -> None:
    given = tiny_recipe(
        shards, f"method.name={name}", *CASES[name], f"init.weights={byol}", "seed=7"
    )
    method, theirs = build_method(given, ALONE, True, classes=NAMES_OF), final_weights(byol)
    backbones = [m for m in method.modules() if isinstance(m, Backbone)]  # a teacher's too
    assert method.trunk in backbones
    for backbone in backbones:
        for key, value in backbone.state_dict().items():
            np.testing.assert_array_equal(value, theirs[f"model/backbone.{key}"])


def test_deepcluster_goes_on_from_byol(byol: Path, shards: Path, tmp_path: Path) -> None:
    given = tiny_recipe(shards, f"init.weights={byol}", "train.epochs=1", "train.lr=1e-9")
    pretrain(given, tmp_path / "next")
    ours, theirs = final_weights(tmp_path / "next"), final_weights(byol)
    name = next(n for n in ours if n.startswith("model/backbone") and n.endswith("weight"))
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
    assert Run(tmp_path / "next").rounds()[0] == 0


@pytest.mark.parametrize(("first", "second", "head"), [
    ("swav", "suave", ("projection", "prototypes")), ("dino", "daino", ("head", "teacher.head")),
])  # fmt: skip
def test_labels_go_on_from_a_clustered_backbone_with_head_and_prototypes_new(
    first: str, second: str, head: tuple[str, ...], shards: Path, tmp_path: Path
) -> None:
    pretrain(
        tiny_recipe(shards, f"method.name={first}", *CASES[first], "train.epochs=1"), tmp_path / "a"
    )
    keys = f"method.name={second}", *CASES[second], "train.epochs=1", "train.lr=1e-9", "seed=3"
    given = tiny_recipe(shards, *keys, f"init.weights={tmp_path / 'a'}")
    pretrain(given, tmp_path / "b")
    ours, theirs = final_weights(tmp_path / "b"), final_weights(tmp_path / "a")
    run = Run(tmp_path / "b")
    fresh = build_method(run.recipe, ALONE, False, classes=class_names(run)).state_dict()
    for name, value in ours.items():
        key = name.removeprefix("model/")
        if not name.endswith(("weight", "bias")):
            continue
        if key.startswith("backbone"):
            kept = theirs.get(f"model/teacher.{key}", theirs[name])  # what counts of DINO
            np.testing.assert_allclose(value, kept, atol=1e-6)
        elif key.startswith(head) and value.ndim == 2:
            expected = fresh[key].numpy()
            if key == "prototypes.weight":  # of length one in every step
                expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(value, expected, atol=1e-5)
            assert name not in theirs or not np.array_equal(value, theirs[name])


@pytest.mark.parametrize("source", ["https://host/net.pth", "runs/none", "."])
def test_what_is_no_source_is_named_with_what_would_be_one(source: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"init.weights: {source} is neither a run")):
        load_weights(build_backbone("conv4", image_size=16), source)


def test_start_weights_of_other_images_say_which_keys_to_set() -> None:
    data = Data(shards="unread")
    note = other_normalisation("timm:vit_base_patch16_224.augreg_in21k", data)
    keys = shlex.split(note.partition("Add ")[2].partition(" to ")[0])
    assert keys == ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]"]
    half = (0.5, 0.5, 0.5)
    fitting = data.model_copy(update={"mean": half, "std": half})
    assert other_normalisation("timm:vit_base_patch16_224.augreg_in21k", fitting) == ""
    assert other_normalisation("torchvision:resnet18", data) == ""
    assert other_normalisation("own.pth", fitting) == ""

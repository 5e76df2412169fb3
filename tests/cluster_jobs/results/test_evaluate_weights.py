"""Evaluation of weights that are of no run: exports, and files of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster_jobs.results.evaluate import evaluate_run
from cluster_jobs.results.evaluate_weights import evaluate_weights, is_weights
from deepclust import pretrain
from deepclust.errors import DataError, RecipeError
from deepclust.models import build_backbone, start_weights
from deepclust.trained.weights import Network, fresh_of, weights_embedder
from tests.tiny import deepclust, tiny_recipe, tiny_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"), n=120)


@pytest.fixture(scope="module")
def run_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    pretrain(tiny_recipe(shards, "train.epochs=1"), path)
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the layout of others: torch.save, prefixes, no word on the network."""
    file = tmp_path_factory.mktemp("files") / "foreign.pth"
    state = build_backbone("resnet18_small", image_size=16, seed=5).net.state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    return file


def test_an_export_has_the_scores_of_its_run(run_dir: Path, shards: Path) -> None:
    export = run_dir / "export" / "backbone.safetensors"
    names, both = ["knn", "retrieval"], (str(shards), str(shards))
    ours = evaluate_run(run_dir, *both, names)
    scores = evaluate_weights(str(export), *both, Network(), names)
    assert scores["knn"]["top1"] == pytest.approx(ours["knn"]["top1"], abs=0.01)
    assert scores["retrieval"]["map"] == pytest.approx(ours["retrieval"]["map"], abs=1e-3)
    assert scores["baselines"]["pixels"] == ours["baselines"]["pixels"]
    assert scores["baselines"].keys() == ours["baselines"].keys()


def test_other_peoples_weights_are_measured_with_the_network_that_is_named(
    foreign: Path, shards: Path
) -> None:
    done = deepclust(
        "evaluate", foreign, "--train", shards, "--test", shards, "--with", "knn", "--json",
        "--backbone", "resnet18_small", "--size", 16,
    )  # fmt: skip
    scores = json.loads(done.stdout)
    assert set(scores) == {"knn", "baselines"}
    assert "120 tensors under state_dict/" in done.stderr
    embedder, _ = weights_embedder(str(foreign), Network("resnet18_small", 16))
    state = build_backbone("resnet18_small", image_size=16, seed=5).net.state_dict()
    ours = embedder.method.trunk.net.state_dict()
    assert all(torch.equal(ours[key].cpu(), value) for key, value in state.items())
    fresh = fresh_of(embedder).method.trunk.net.state_dict()
    assert not torch.equal(fresh["conv1.weight"].cpu(), state["conv1.weight"])


def test_weights_that_do_not_fit_are_refused_in_the_words_of_the_command(
    foreign: Path, run_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"does not say which network.*--backbone NAME"):
        weights_embedder(str(foreign), Network())
    with pytest.raises(RecipeError, match=r"^(?!init).*Set --backbone") as refused:
        weights_embedder(str(foreign), Network("resnet50", 64))
    assert "backbone.name" not in str(refused.value)
    with pytest.raises(RecipeError, match="leave --backbone"):
        weights_embedder(str(run_dir / "export/backbone.safetensors"), Network("resnet18"))
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(DataError):
        weights_embedder(str(tmp_path / "broken.pth"), Network("resnet18"))
    assert is_weights("timm:vit_tiny_patch16_224")
    assert not is_weights(str(run_dir))


def test_weights_of_a_library_see_images_normalised_as_in_their_training(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(foreign, weights_only=True)
    monkeypatch.setitem(start_weights.SCHEMES, "timm", lambda name: state)  # without a network
    name = "timm:vit_base_patch16_224.augreg_in21k"
    embedder, taken = weights_embedder(name, Network("resnet18_small", 16))
    assert (embedder.data.mean, embedder.data.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert "mean [0.5, 0.5, 0.5]" in taken

"""A method and a backbone from outside the package: trained, killed, resumed and exported."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster_jobs.results.evaluate import load_trunk
from deepclust import load_backbone
from deepclust.export.backbone import weights_hash
from deepclust.models import build_backbone
from deepclust.recipe import Recipe
from deepclust.run.directory import Run
from deepclust.stages.warm_start import load_weights
from tests.killing import kill_when, start, training
from tests.methods.cases import CASES, TOY
from tests.tiny import assert_same_run, deepclust, final_weights, tiny_recipe

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's part: the folder of the modules is on the path of every process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def toy(shards: Path, ranks: int) -> Recipe:
    return tiny_recipe(
        shards, f"method.name={TOY}", *CASES[TOY], f"train.ranks={ranks}", "train.log=1",
        "train.epochs=3", "train.checkpoint=5 steps",
    )  # fmt: skip


def test_a_killed_toy_of_two_ranks_resumes_to_the_same_bits(shards: Path, tmp_path: Path) -> None:
    toy(shards, 2).save(tmp_path / "toy.yaml")
    deepclust("pretrain", tmp_path / "toy.yaml", "--run", tmp_path / "straight")
    process = start("pretrain", tmp_path / "toy.yaml", "--run", tmp_path / "killed")
    assert kill_when(process, tmp_path / "killed", training, 0.1)
    deepclust("resume", tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    files = {file.name for file in Run(tmp_path / "killed").checkpoints()[-1].iterdir()}
    assert {"body.safetensors", "head.safetensors"} <= files
    assert any("exp_avg_sq" in key for key in final_weights(tmp_path / "killed"))


def test_the_teacher_is_exported_and_rounds_have_two_heads(shards: Path, tmp_path: Path) -> None:
    toy(shards, 1).save(tmp_path / "toy.yaml")
    deepclust("pretrain", tmp_path / "toy.yaml", "--run", tmp_path / "run")
    run = Run(tmp_path / "run")
    weights = load_file(run.checkpoints()[-1] / "model.safetensors")
    import_module("tests.toys.backbone")  # no file's word is enough to import a module
    net = load_backbone(tmp_path / "run/export/backbone.safetensors")
    for name, value in net.net.state_dict().items():
        np.testing.assert_array_equal(value, weights[f"teacher.backbone.net.{name}"])
    inherited = build_backbone("tests.toys.backbone", image_size=16, seed=1)
    load_weights(inherited, str(tmp_path / "run"))
    for other in (inherited, load_trunk(run)):
        assert weights_hash(other.export_state()) == weights_hash(net.export_state())
    assert not np.array_equal(
        weights["teacher.backbone.net.0.weight"], weights["backbone.net.0.weight"]
    )
    assignments = np.load(run.round(1) / "assignments" / "assignments.npy")
    assert assignments.shape == (2, 300)
    assert not np.array_equal(*assignments)
    record = run.metrics("train")[-1]
    assert {"classes", "followed", "term_mean_entropy", "grad_norm"} <= record.keys()
    deepclust("report", tmp_path / "run")
    assert (tmp_path / "run/report.html").exists()

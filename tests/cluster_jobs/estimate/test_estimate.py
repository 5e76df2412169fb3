"""The estimate: counts are those of a real run, sizes those of known networks, and it is no run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster_jobs.cli import app
from cluster_jobs.estimate import estimate, seconds
from cluster_jobs.estimate.calibrate import _short, speeds_of_run
from cluster_jobs.estimate.counts import count
from cluster_jobs.estimate.devices import DEVICES, device_of
from cluster_jobs.estimate.network import measure
from cluster_jobs.estimate.show import lines
from deepclust import open_index
from deepclust.errors import RecipeError
from deepclust.recipe import Recipe, shipped
from deepclust.run.directory import Run
from tests.tiny import tiny_recipe

IMAGENET = 1_281_167
H100 = DEVICES["h100"]


def imagenet(name: str, *overrides: str) -> Recipe:
    return Recipe.load(name, "data.shards=not-read", *overrides)


def test_the_counts_are_those_of_a_real_run(final_run: Path) -> None:
    run = Run(final_run)
    events = [event["event"] for event in run.events()]
    samples = len(open_index(run.recipe.data.shards))
    made = count(run.recipe, samples)
    assert made.rounds == events.count("clustered")
    assert made.extractions == events.count("extracted")
    assert made.checkpoints == events.count("checkpoint")
    assert made.steps == run.metrics("train")[-1]["step"]


@pytest.mark.parametrize(
    ("every", "overlap", "rounds"),
    [("1 epoch", "false", 4), ("2 epochs", "false", 2), ("5 steps", "false", 8)],
)
def test_rounds_follow_the_cadence(shards: Path, every: str, overlap: str, rounds: int) -> None:
    changes = ["train.epochs=4", "train.batch=30", f"cluster.every={every}", "cluster.final=false"]
    made = count(tiny_recipe(shards, *changes, f"cluster.overlap={overlap}"), 300)
    assert (made.steps, made.rounds) == (40, rounds)


def test_a_resnet_50_has_the_published_size() -> None:
    network = measure(imagenet("deepcluster-resnet50-imagenet", "backbone.sobel=false"))
    assert network.parameters == pytest.approx(23.5e6, rel=0.01)
    assert network.extract_flops == pytest.approx(2 * 4.09e9, rel=0.02)
    assert network.step_flops == 3 * network.extract_flops


@pytest.mark.parametrize("name", [n for n in shipped() if n.endswith(("imagenet", "yfcc100m"))])
def test_every_paper_recipe_has_an_estimate_for_a_named_device(name: str) -> None:
    made = estimate(imagenet(name), IMAGENET, H100)
    assert made.total > 3600
    assert all(took > 0 for took in made.seconds.values())
    assert any("none of it measured" in one for one in made.assumptions)
    assert "in all" in "\n".join(lines(made))
    assert json.loads(json.dumps(made.as_dict()))["gpu_hours"] == made.gpu_hours


def test_what_does_not_fit_names_the_key_that_makes_it_fit() -> None:
    small = replace(H100, memory=2e9)
    (warning,) = estimate(imagenet("deepcluster-resnet50-imagenet"), IMAGENET, small).warnings
    key = warning.split(": ")[1].split(" ")[0]
    assert key.startswith("train.accumulate=")
    recipe = imagenet("deepcluster-resnet50-imagenet", key)
    assert estimate(recipe, IMAGENET, small).warnings == []


def test_more_ranks_take_less_time_and_more_images_take_more() -> None:
    one, eight = (
        estimate(imagenet("deepcluster-resnet50-imagenet", f"train.ranks={n}"), IMAGENET, H100)
        for n in (1, 8)
    )
    assert eight.seconds["training"] < one.seconds["training"] / 4
    twice = estimate(imagenet("deepcluster-resnet50-imagenet"), 2 * IMAGENET, H100)
    assert twice.seconds["extraction"] > 1.5 * eight.seconds["extraction"]


def test_a_short_run_gives_the_speeds_of_its_stages(final_run: Path) -> None:
    run = Run(final_run)
    samples = len(open_index(run.recipe.data.shards))
    speeds = speeds_of_run(run, samples)
    assert min(speeds.trained, speeds.extracted, speeds.pairs) > 0
    made = seconds(run.recipe, count(run.recipe, samples), speeds)
    assert set(made) == {"start", "extraction", "clustering", "training", "checkpoints"}


@pytest.mark.parametrize("method", ["demo", "deepercluster", "deepcluster-v2", "sela"])
def test_a_clustering_of_levels_and_heads_takes_what_it_took(method: str) -> None:
    recipe = imagenet(f"{method}-fashion")
    run = SimpleNamespace(recipe=recipe, events=lambda: EVENTS, metrics=lambda kind: STEPS)
    speeds = speeds_of_run(run, 60_000)  # type: ignore[arg-type]
    counts = replace(count(recipe, 60_000), rounds=1)
    assert seconds(recipe, counts, speeds)["clustering"] == pytest.approx(5.0)


EVENTS = [  # of a run that clusters for 2 s in a round of 5 s after its extraction
    {"event": "started", "time": 0.0}, {"event": "unit", "time": 1.0},
    {"event": "extracted", "time": 3.0}, {"event": "clustered", "time": 7.0},
    {"event": "published", "time": 7.5, "cluster": 2.0}, {"event": "waited", "time": 8.0},
    {"event": "training", "time": 8.5},
]  # fmt: skip
STEPS = [{"step": step, "images_per_s": 100.0} for step in (2, 4, 6)]


def test_the_short_run_does_the_same_work_for_an_image(shards: Path) -> None:
    recipe = tiny_recipe(shards)
    short = _short(recipe, Path("/part"), 100)
    assert (short.train.epochs, short.clustering.k) == (2, min(recipe.clustering.k, 10))
    assert short.train.batch == recipe.train.batch
    assert short.backbone == recipe.backbone


def test_an_unknown_device_or_a_number_without_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="choose from h200"):
        device_of("h900")
    with pytest.raises(RecipeError, match="--samples needs --device"):
        estimate(imagenet("swav-resnet50-imagenet"), IMAGENET, None)


def test_the_verb_prints_one_json_document() -> None:
    words = ["estimate", "moco-v2-fashion", "--device", "a100", "--samples", "60000", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"]["samples"] == 60_000


@pytest.mark.slow
def test_this_machine_is_measured_by_a_short_run(shards: Path) -> None:
    index = open_index(shards)
    made = estimate(tiny_recipe(shards), index, None)
    assert made.counts.samples == len(index)
    assert made.gpus == 0
    assert "measured here" in made.assumptions[0]

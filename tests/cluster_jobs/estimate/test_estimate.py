"""The estimate: counts are those of a real run, sizes those of known networks, and it is no run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster_jobs.cli import app
from cluster_jobs.estimate import estimate, seconds
from cluster_jobs.estimate.calibrate import _extracted, _short, speeds_of_run
from cluster_jobs.estimate.counts import count
from cluster_jobs.estimate.devices import DEVICES, device_of
from cluster_jobs.estimate.disk import rounds_of
from cluster_jobs.estimate.fits import Room, misfits
from cluster_jobs.estimate.growth import STAGES, growth
from cluster_jobs.estimate.kept import keep, kept
from cluster_jobs.estimate.line import line
from cluster_jobs.estimate.network import measure
from cluster_jobs.estimate.rows import seconds_of_a_row
from cluster_jobs.estimate.show import _size, lines
from cluster_jobs.estimate.sizes import sizes
from cluster_jobs.estimate.spans import spans_of
from cluster_jobs.estimate.speeds import Speeds
from cluster_jobs.estimate.watch import Watch, folder_bytes
from deepclust import open_index
from deepclust.errors import RecipeError
from deepclust.recipe import Recipe, shipped
from deepclust.run.directory import Run
from tests.tiny import deepclust, tiny_recipe

ROOT = Path(__file__).parents[3]
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


def test_a_checkpoint_is_as_large_as_the_run_writes_it(final_run: Path) -> None:
    run = Run(final_run)
    network, counts = measure(run.recipe), count(run.recipe, 300)
    written = sum(file.stat().st_size for file in run.checkpoints()[-1].rglob("*.safetensors"))
    assert sizes(run.recipe, network, counts).checkpoint == pytest.approx(written, rel=0.05)


def test_the_run_directory_is_as_large_as_the_estimate_says(final_run: Path) -> None:
    run = Run(final_run)
    made = sizes(run.recipe, measure(run.recipe), count(run.recipe, 300))
    folders = [run.path / name for name in ("checkpoints", "rounds", "export")]
    assert made.disk == pytest.approx(sum(map(folder_bytes, folders)), rel=0.05)


def test_a_bank_is_extracted_twice_and_its_rows_are_projections() -> None:
    recipe = imagenet("deepcluster-v2-small-photos", "cluster.every=1 epoch")
    network, counts = measure(recipe), count(recipe, IMAGENET)
    first, bank, *_, last = rounds_of(recipe, network, counts)
    assert counts.extractions == 2
    assert first.raw == last.raw == first.rows == 2 * IMAGENET * 64  # and no moments
    assert (bank.raw, bank.rows) == (0, 2 * first.rows)


def test_checkpoints_of_rounds_by_steps_and_evaluations_are_counted(shards: Path) -> None:
    keys = ["train.epochs=4", "train.batch=30", "cluster.every=15 steps", "train.evaluate=1 epoch"]
    made = count(tiny_recipe(shards, *keys), 300)
    assert made.checkpoints == len({0, 10, 15, 20, 30, 40})
    assert (made.evaluations, made.evaluated) == (4, 300)
    speeds = Speeds(0.0, 100.0, 100.0, 0.0, evaluated=30.0)
    assert seconds(tiny_recipe(shards, *keys), made, speeds)["evaluation"] == 4 * 10


def test_each_rank_has_chunks_that_it_has_not_reported() -> None:
    at = [4.0, 5.0, 6.0, 7.0, 8.0, 8.0, 8.0, 8.0]  # eight chunks of 100 images
    for ranks, between in ((1, 600), (2, 400)):
        run = SimpleNamespace(
            rounds=lambda: [0], recipe=SimpleNamespace(train=SimpleNamespace(ranks=ranks)),
            events=lambda: [{"event": "unit", "round": 0, "time": one} for one in at],
        )  # fmt: skip
        rate, beside = _extracted(run, 800, [10.0])  # type: ignore[arg-type]
        assert rate == between / 4
        assert beside == pytest.approx(10 - 800 / rate)


def test_the_parts_of_a_head_are_shared_between_ranks() -> None:
    network = measure(imagenet("deepercluster-vgg16-yfcc100m"))
    assert network.owned > 10 * network.parameters
    assert network.trained > network.owned + network.parameters
    one, many = (
        estimate(imagenet("deepercluster-vgg16-yfcc100m", f"train.ranks={n}"), IMAGENET, H100).sizes
        for n in (1, 8)
    )
    assert many.state < one.state / 4
    assert many.checkpoint == one.checkpoint


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
    speeds = speeds_of_run(run, samples, spans_of(run), row=1e-6)
    assert min(speeds.trained, speeds.extracted, speeds.start) > 0
    made = seconds(run.recipe, count(run.recipe, samples), speeds)
    assert set(made) == {"start", "extraction", "clustering", "training", "checkpoints"}


def test_the_stages_of_a_run_add_up_to_its_whole(final_run: Path) -> None:
    run = Run(final_run)
    events = run.events()
    began, ended = events[0]["time"] - 1, events[-1]["time"] + 2
    spans = spans_of(run, began, ended)
    assert sum(spans.seconds.values()) == pytest.approx(ended - began)
    assert spans.seconds["start"] > 3
    assert sum(steps for steps, _ in spans.plans) == run.metrics("train")[-1]["step"]
    assert len(spans.plans) == count(run.recipe, 300).segments


def test_what_comes_up_in_the_first_extraction_counts_as_the_start() -> None:
    run = SimpleNamespace(
        recipe=imagenet("demo-fashion"), events=lambda: EVENTS, metrics=lambda kind: STEPS
    )
    spans = spans_of(run)  # type: ignore[arg-type]
    assert spans.seconds["start"] == pytest.approx(1 + 5)  # 7 s of images, and 2 s a later time
    assert spans.extractions == pytest.approx([2.0, 2.0])
    assert spans.rounds == pytest.approx([4.0, 4.0])
    assert spans.plans == [(4, 3.0), (4, 2.0)]


EVENTS = [
    {"event": "started", "time": 0.0}, {"event": "unit", "time": 1.0},
    {"event": "extracted", "time": 8.0}, {"event": "clustered", "time": 11.0},
    {"event": "waited", "time": 12.0}, {"event": "training", "time": 13.0},
    {"event": "checkpoint", "time": 15.5}, {"event": "extracted", "time": 17.5},
    {"event": "waited", "time": 21.5}, {"event": "training", "time": 22.0},
]  # fmt: skip
STEPS = [
    {"step": 2, "time": 14.0}, {"step": 4, "time": 15.0}, {"step": 8, "time": 23.5},
]  # fmt: skip


def test_a_row_takes_longer_in_more_clusters_and_more_heads() -> None:
    few, many = (
        min(
            seconds_of_a_row(imagenet("demo-fashion", f"cluster.k={k}"), 4000, 64, 32) for _ in "ab"
        )
        for k in (10, 1500)
    )
    assert many > few > 0
    assert seconds_of_a_row(imagenet("swav-small-photos"), 4000, 64, 32) == 0


def test_a_process_and_its_children_are_watched(tmp_path: Path) -> None:
    text = "import sys, time; held = bytearray(50_000_000); time.sleep(1.5)"
    command = ["sh", "-c", f"{sys.executable} -c '{text}'; true"]
    (tmp_path / "file").write_bytes(bytes(1000))
    process = subprocess.Popen(command)
    with Watch(process.pid, tmp_path) as watch:
        process.wait()
        (tmp_path / "more").write_bytes(bytes(500))
    assert 50e6 < watch.memory < 90e6
    assert watch.disk == 1500


def test_speeds_are_kept_for_the_same_work_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe, speeds = imagenet("demo-fashion"), Speeds(1.0, 2.0, 3.0, 4.0)
    assert kept(recipe) is None
    keep(recipe, speeds)
    longer = imagenet("demo-fashion", "train.epochs=99", "data.shards=elsewhere", "seed=5")
    assert kept(longer) == (speeds, pytest.approx(time.time(), abs=60))
    assert kept(imagenet("demo-fashion", "train.batch=128")) is None
    next(tmp_path.rglob("*.json")).write_text("{}")
    assert kept(recipe) is None


@pytest.mark.parametrize("known", [False, True])
def test_a_line_says_what_is_known_without_measuring(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_index(shards)  # the line builds none
    recipe = tiny_recipe(shards)
    if known:
        keep(recipe, Speeds(60.0, 1e3, 1e3, 1e-6, memory=2e9, shown=300))
    text = line(recipe, "my.yaml", ["seed=1"], "local")
    assert text.startswith("estimate: 300 images, 24 steps, 2 rounds")
    assert ("about 1 min 1 s and 2.0 GB of memory" in text) == known
    assert ("deepclust estimate my.yaml seed=1" in text) == (not known)
    assert "--on slurm --device" in line(recipe, "my.yaml", [], "slurm")


def test_the_line_needs_no_torch_and_a_missing_index_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys; from cluster_jobs.estimate.line import line; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    text = line(tiny_recipe(tmp_path / "none"), "my.yaml", [], "local")
    assert "no index of data.shards yet" in text


def test_the_short_run_alarms_and_tracks_nobody(shards: Path) -> None:
    loud = (
        "notify.command=mail", "track=[tensorboard]", "train.evaluate=1 epoch",
        f"train.evaluate_data={shards}",
    )  # fmt: skip
    short = _short(tiny_recipe(shards, *loud), shards, 300)
    assert (short.notify, short.track, short.train.evaluate) == (None, (), None)
    assert _short(tiny_recipe(shards, *loud), shards, 300, True).train.evaluate == "1 epoch"


def test_the_line_tells_no_secret(tmp_path: Path) -> None:
    given = [
        "notify.webhook=https://hooks.example/T0/letmein", "notify={command: curl letmein}",
        "data.shards=https://me:letmein@host/s?key=letmein", "ray.env={KEY: letmein}",
        "ray={env: {KEY: letmein}}", "ray.env.KEY=letmein", "data.index=/a: b#", "train.epochs=3",
    ]  # fmt: skip
    text = line(tiny_recipe(tmp_path / "none"), "my.yaml", given, "local")
    assert "letmein" not in text
    assert "train.epochs=3" in text
    assert "data.shards=https://" in text


def test_a_run_and_a_dry_run_print_the_line(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    tiny_recipe(shards, "train.epochs=1").save(file)
    open_index(shards)
    dry = deepclust("submit", file, "--run", tmp_path / "a", "--dry-run")
    real = deepclust("pretrain", file, "--run", tmp_path / "a")
    for done in (dry, real):
        assert done.stderr.count("estimate: 300 images, 12 steps, 1 rounds") == 1, done.stderr


@pytest.mark.parametrize(
    ("room", "recipe", "key"),
    [
        (Room("card", device=1e9), "deepcluster-resnet50-imagenet", "data.extract_batch="),
        (Room("card", device=3e8), "deepcluster-resnet50-imagenet", "cluster.where=ranks"),
        (Room("here", host=1e9), "deepcluster-resnet50-imagenet", "data.workers=6"),
        (Room("here", disk=1e9), "deepcluster-resnet50-imagenet", "keep.features=0"),
    ],
)
def test_each_stage_that_does_not_fit_names_a_key(room: Room, recipe: str, key: str) -> None:
    chosen = imagenet(recipe, "data.workers=12", "train.ranks=8")
    made = estimate(chosen, IMAGENET, H100).sizes
    assert any(key in text for text in misfits(chosen, made, room)), misfits(chosen, made, room)
    assert misfits(chosen, made, Room("large", 1e15, 1e15, 1e15)) == []


def test_a_cluster_worker_holds_a_gpu_unless_it_clusters_on_the_cpu() -> None:
    alone = ("train.ranks=8", "cluster.where=worker")
    gpus = [
        estimate(imagenet("deepcluster-resnet50-imagenet", *words), IMAGENET, H100).gpus
        for words in (alone, (*alone, "cluster.gpus=0"), ("train.ranks=8", "cluster.where=ranks"))
    ]
    assert gpus == [9, 8, 8]


def test_a_checkpoint_counts_twice_only_where_an_older_one_has_to_go() -> None:
    def beyond_the_end(epochs: int) -> float:
        words = (f"train.epochs={epochs}", "train.checkpoint=1 epoch", "keep.checkpoints=3")
        made = estimate(imagenet("swav-resnet50-imagenet", *words), IMAGENET, H100).sizes
        return made.disk_peak - made.disk

    few, many = beyond_the_end(3), beyond_the_end(5)
    assert few == 0
    assert many > 4.0 * 23e6  # the weights at least, which the export has once


def test_an_executor_gives_the_ranks_that_it_would_have() -> None:
    words = ["estimate", "deepcluster-resnet50-imagenet", "--samples", "1281167"]
    done = CliRunner().invoke(
        app, [*words, "--on", "slurm", "--device", "h100", "train.ranks=16", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ranks"] == 16
    here = CliRunner().invoke(app, [*words, "--on", "slurm"])
    assert isinstance(here.exception, RecipeError)
    assert "--on slurm needs --device" in str(here.exception)


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


def test_stages_of_a_hundred_million_samples_cost_what_was_walked_through() -> None:
    rows = json.loads((ROOT / "tools/bench/measured/walk.json").read_text())["rows"]
    of = {(row["stage"], row["n"]): row["seconds"] for row in rows if row["stage"] in STAGES}
    assert {name for name, _ in of} == set(STAGES)
    assert max(n for _, n in of) == 10**8
    for (name, n), took in of.items():
        assert 0.5 * took < growth(name, n) < 2 * took + 0.1


def test_what_a_short_run_has_shown_is_not_counted_again() -> None:
    assert growth("plan", 10**6, shown=10**6) == 0
    assert growth("plan", 10**8, shown=10**6) == growth("plan", 10**8) - growth("plan", 10**6)
    assert growth("plan", 1) >= 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999.6, "1 kB"), (1e6, "1 MB"), (2.24e14, "224 TB"), (2.24e17, "224 PB")],
)
def test_bytes_have_three_digits_and_a_unit_that_fits_its_column(count: float, text: str) -> None:
    assert _size(count) == text

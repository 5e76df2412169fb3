"""The command line as people and scripts use it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from typer.testing import CliRunner

from cluster_jobs import cli
from cluster_jobs.cli import common
from deepclust import Recipe, __version__
from deepclust.run.directory import Run
from tests.tiny import deepclust, tiny_recipe, tiny_shards

VERBS = "demo pack index pretrain submit status logs cancel resume extract cluster train"
VERBS += " evaluate assignments export report list recipe doctor embed predict duplicates guide vae"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the command."""
    folder = tmp_path_factory.mktemp("runs")
    deepclust("pretrain", recipe(shards, folder), "--run", folder / "finished")
    return folder / "finished"


def recipe(shards: Path, folder: Path, *overrides: str) -> Path:
    tiny_recipe(shards, "train.epochs=1", *overrides).save(folder / "tiny.yaml")
    return folder / "tiny.yaml"


def status(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(deepclust("status", folder, "--json").stdout)
    return found


def wait_for_state(run: Path, *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + 90
    while (found := status(run)[0])["state"] not in states:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


def test_help_lists_every_verb_and_imports_no_torch() -> None:
    code = (
        "import sys, cluster_jobs.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    text = deepclust("--help").stdout
    assert all(verb in text for verb in VERBS.split())


def test_every_verb_has_an_example_and_sentences_in_its_help() -> None:
    import typer

    from cluster_jobs.cli import app

    command = typer.main.get_command(app)
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        assert f"deepclust {name}" in verb.epilog
        for parameter in verb.params:
            if parameter.name != "help":
                assert parameter.help.endswith("."), f"{name} {parameter.name}: {parameter.help}"


def test_at_80_columns_no_help_is_cut_or_loses_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from cluster_jobs.cli import app

    monkeypatch.setenv("COLUMNS", "80")
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [name, "--help"], prog_name="deepclust").output
        assert max(map(len, shown.splitlines())) <= 80
        for text in (verb.help, verb.epilog, *(parameter.help for parameter in verb.params)):
            assert letters(text) in letters(shown), f"{name}: {text}"


def letters(text: str) -> str:
    return "".join(c for c in text if not c.isspace() and c != "│")


def test_version_prints_the_version() -> None:
    assert deepclust("--version").stdout == f"deepclust {__version__}\n"


@pytest.mark.parametrize("name", ["moco-v2-fashion", "no-such-recipe"])
def test_what_a_command_has_begun_ends_with_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(common, "STILL_S", 0.01)
    words = ["estimate", name, "--device", "a100", "--samples", "60000"]
    done = CliRunner().invoke(cli.app, words)
    assert (done.exit_code == 0) is (name == "moco-v2-fashion")
    for thread in threading.enumerate():
        if thread.name == common.BEAT:
            thread.join(5.0)
            assert not thread.is_alive()


def test_a_bad_option_is_usage_and_exits_with_2() -> None:
    assert "No such option" in deepclust("status", "--nonsense", code=2).stderr


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(
    shards: Path, tmp_path: Path
) -> None:
    done = deepclust(
        "submit", recipe(shards, tmp_path), "--run", tmp_path / "run", "--dry-run", "cluster.k=9"
    )
    assert "k: 9" in done.stdout
    assert "resume" in done.stdout
    assert not (tmp_path / "run").exists()


def test_pack_says_its_classes_and_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    from cluster_jobs.cli import app
    from tests.images import make_image_folder

    (make_image_folder(tmp_path / "in", n=4, classes=2) / "notes.txt").write_text("text")
    words = ["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--classes", "last"]
    words = [*words, "--range", "0:4095"]
    typer.main.get_command(app).main(words, standalone_mode=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines.pop(0) == f"packing into {tmp_path / 'out'}"
    assert lines[:3] == ["2 classes: class-0, class-1", "left out: 1 file", "  1 .txt (notes.txt)"]
    assert lines[3].startswith("4 samples in 4 shards: ")
    words[2:3] = [str(make_image_folder(tmp_path / "more", n=2)), str(tmp_path / "both")]
    typer.main.get_command(app).main(words, standalone_mode=False)
    assert "6 samples in 6 shards: " in capsys.readouterr().err


@pytest.mark.slow
def test_pack_and_index_accept_an_image_folder_and_foreign_shards(
    shards: Path, tmp_path: Path
) -> None:
    from tests.images import make_image_folder

    make_image_folder(tmp_path / "photos")
    assert "samples in" in deepclust("pack", tmp_path / "photos", tmp_path / "out").stderr
    assert "300 samples in 3 shards, labels" in deepclust("index", shards).stderr
    assert "300 samples" in deepclust("index", shards, "--verify").stderr


@pytest.mark.slow
def test_status_lists_the_runs_of_a_folder(run: Path) -> None:
    (found,) = status(run.parent)
    assert (found["name"], found["state"], found["step"]) == ("finished", "SUCCEEDED", 12)
    assert "SUCCEEDED" in deepclust("status", run).stdout


@pytest.mark.slow
def test_a_submitted_run_goes_on_by_itself_and_shows_its_log(shards: Path, tmp_path: Path) -> None:
    deepclust("submit", recipe(shards, tmp_path), "--on", "local", "--run", tmp_path / "run")
    assert wait_for_state(tmp_path / "run", "SUCCEEDED", "FAILED")["state"] == "SUCCEEDED"
    assert "finished" in deepclust("logs", tmp_path / "run", "-f").stdout


@pytest.mark.slow
def test_a_cancelled_run_stops_at_a_step_and_can_be_resumed(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    deepclust("submit", recipe(shards, tmp_path, "train.epochs=400"), "--run", run)
    wait_for_state(run, "RUNNING")
    while not Run(run).metrics("train"):
        time.sleep(0.1)
    assert "was stopped" in deepclust("cancel", run).stderr
    assert status(run)[0]["state"] == "STOPPED"
    assert Run(run).checkpoints()
    assert "is not running" in deepclust("cancel", run).stderr


@pytest.mark.slow
def test_evaluate_prints_one_json_document(run: Path, shards: Path) -> None:
    done = deepclust("evaluate", run, "--train", shards, "--test", shards, "--json")
    scores = json.loads(done.stdout)
    assert scores["knn"].keys() >= {"top1"}
    assert scores["linear"].keys() >= {"top1"}
    assert scores["clusters"].keys() >= {"nmi", "ari", "accuracy"}
    assert json.loads((run / "evaluations" / "00000012.json").read_text())["scores"] == scores


@pytest.mark.slow
def test_export_refuses_what_torchvision_does_not_have(run: Path, tmp_path: Path) -> None:
    refused = deepclust(
        "export", run, "--format", "torchvision", "--out", tmp_path / "x.pth", code=2
    )
    assert "safetensors" in refused.stderr
    deepclust("export", run, "--format", "safetensors", "--out", tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
def test_a_report_is_one_page_with_pictures(run: Path, tmp_path: Path) -> None:
    deepclust("report", run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/") >= 8
    assert "finished" in page


@pytest.mark.slow
def test_stages_can_be_run_one_by_one(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    deepclust("submit", recipe(shards, tmp_path), "--run", run)
    wait_for_state(run, "SUCCEEDED")
    for verb in ("extract", "cluster", "train"):
        deepclust(verb, run)  # nothing is due: nothing is done
    assert Run(run).rounds() == [0]


def test_a_printed_recipe_is_one_that_can_be_run(shards: Path, tmp_path: Path) -> None:
    where = f"data.shards={shards}"
    text = deepclust("recipe", "dino-fashion", where, "train.lr=0.5").stdout
    (tmp_path / "mine.yaml").write_text(text)
    again = Recipe.load(tmp_path / "mine.yaml")
    assert again == Recipe.load("dino-fashion", where, "train.lr=0.5")
    assert json.loads(deepclust("recipe", "dino-fashion", "--json").stdout)["seed"] == 0


def test_the_schema_of_a_recipe_has_the_keys_of_its_method_with_words() -> None:
    schema = json.loads(deepclust("recipe", "dino-fashion", "--schema").stdout)
    method = schema["properties"]["method"]["$ref"].rpartition("/")[2]
    assert "prototypes" in schema["$defs"][method]["properties"]
    assert "description" in schema["$defs"]["ClusterSection"]["properties"]["k"]


def test_the_last_lines_of_a_log_are_its_last_lines(run: Path) -> None:
    whole = deepclust("logs", run).stdout.splitlines()
    assert deepclust("logs", run, "-n", 2).stdout.splitlines() == whole[-2:]
    assert deepclust("logs", run, "-n", 0).stdout == ""


def test_a_verb_whose_gpu_is_full_says_how_to_go_on_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    monkeypatch.setattr(cli, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 4
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU is out of memory (CUDA out of memory. Tried")
    assert said.count("\n") == 1

"""The model card of an export: the hub reads its header, and it says what the run says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from cluster_jobs.cli import app
from cluster_jobs.results.export import export_run
from deepclust.errors import DataError
from deepclust.files import read_json, write_json
from deepclust.run.directory import Run

SCORES = {
    "knn": {"top1": 0.8765, "interval": [0.86, 0.89]},
    "baselines": {
        "majority": {"top1": 0.1},
        "pixels": {"knn": {"top1": 0.7}},
        "rows": {"train": 9},
    },
}


def card_of(run: Path, folder: Path, classifier: bool = False) -> str:
    """The text of the card of one export."""
    out, card = folder / "net.safetensors", folder / "card.md"
    export_run(run, out, emit=print, classifier=classifier, card=card)
    return card.read_text()


def test_the_hub_reads_the_header_of_a_folder(resnet: Path, tmp_path: Path) -> None:
    export_run(resnet, tmp_path / "net", "hf", emit=print, classifier=True)
    card = ModelCard.load(tmp_path / "net" / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert {"deepclust", "deepcluster", "resnet18"} <= set(card.data.tags)
    assert "license" not in card.data.to_dict()


def test_it_says_what_the_run_says(resnet: Path, tmp_path: Path) -> None:
    text = card_of(resnet, tmp_path, classifier=True)
    run = Run(resnet)
    facts = (
        read_json(resnet / "data.json")["fingerprint"],
        str(read_json(resnet / "env.json")["git"]),
        str(run.recipe.data.shards),
        f"mean {list(run.recipe.data.mean)}",
        "k: 8",
        "It tells 8 clusters, of which 0 are named",
        "Caron et al.",
        "load_clusters('net.safetensors')",
    )
    assert not [fact for fact in facts if fact not in text]


def test_nothing_is_invented_without_an_evaluation(resnet: Path, tmp_path: Path) -> None:
    text = card_of(resnet, tmp_path)
    assert "were not measured" in text
    assert "top1" not in text


def test_scores_stand_beside_their_baselines_and_are_those_of_this_step(
    resnet: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(resnet, run)
    step = int(Run(run).checkpoints()[-1].name)
    record = {"step": step, "train": "a|b", "test": "test", "scores": SCORES}
    (run / "evaluations").mkdir()
    write_json(run / "evaluations" / f"{step - 1:08d}.json", record)
    assert "were not measured" in card_of(run, tmp_path)
    write_json(run / "evaluations" / f"{step:08d}.json", record)
    text = card_of(run, tmp_path)
    assert "| knn | top1 | 0.8765 | 0.8600 to 0.8900 |" in text
    assert "| baseline pixels knn | top1 | 0.7000 |  |" in text
    assert "| baseline majority | top1 | 0.1000 |  |" in text
    assert "a\\|b" in text
    write_json(run / "evaluations" / f"{step:08d}.json", [])
    with pytest.raises(DataError, match="is damaged"):
        card_of(run, tmp_path)


def test_the_command_writes_it_where_it_is_asked_to(resnet: Path, tmp_path: Path) -> None:
    out, card = str(tmp_path / "net.pth"), tmp_path / "card.md"
    done = CliRunner().invoke(app, ["export", str(resnet), "--out", out, "--card", str(card)])
    assert done.exit_code == 0
    assert "library_name: torchvision" in card.read_text()

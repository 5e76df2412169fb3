"""Evaluation of a run: the network as the method embeds, with the evaluators that are asked for."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster_jobs.display import scores_line
from cluster_jobs.results.evaluate import (
    evaluate_run,
    labelled_features,
    load_embedder,
)
from cluster_jobs.results.export import export_run
from deepclust import load_backbone, load_classifier, open_index, pretrain
from deepclust.data.shards import index_build
from deepclust.errors import DataError, DiskError, RecipeError
from deepclust.files import file_hash
from deepclust.methods.embed import Embedder
from deepclust.run.directory import Run
from deepclust.run.round_files import read_whitening
from deepclust.trained.saved import fresh_embedder
from tests.methods.cases import CASES
from tests.methods.cases import TOY as TOY_METHOD
from tests.tiny import assert_same_run, deepclust, tiny_recipe, tiny_shards

TOY = "tests.toys.evaluator"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"), n=120)


@pytest.fixture(scope="module")
def run_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    recipe = tiny_recipe(shards, "train.epochs=1", "train.precision=bf16", "keep.checkpoints=9")
    pretrain(recipe, path)
    return path


def test_the_toy_evaluator_measures_a_run_without_an_edit_of_the_package(
    run_dir: Path, shards: Path
) -> None:
    scores = evaluate_run(run_dir, str(shards), str(shards), [TOY])
    assert scores[TOY]["top1"] > 0.3
    assert scores[TOY]["grey"] > 0
    done = deepclust(
        "evaluate", run_dir, "--train", shards, "--test", shards, "--with", f"knn,{TOY}", "--json"
    )
    assert json.loads(done.stdout).keys() == {"knn", TOY, "baselines"}
    assert json.loads(done.stdout)[TOY] == scores[TOY]


def test_the_record_keeps_the_scores_of_other_evaluators_on_the_same_shards(
    run_dir: Path, shards: Path, tmp_path: Path
) -> None:
    evaluate_run(run_dir, str(shards), str(shards), [TOY])
    knn = evaluate_run(run_dir, str(shards), str(shards), ["knn"])
    (file,) = (run_dir / "evaluations").glob("*.json")
    record = json.loads(file.read_text())
    assert {TOY, "knn"} <= set(record["scores"])
    assert record["scores"]["knn"] == knn["knn"]
    others = str(tiny_shards(tmp_path / "others", n=60))
    evaluate_run(run_dir, others, others, ["knn"])
    assert set(json.loads(file.read_text())["scores"]) == {"knn", "baselines"}


def test_what_is_evaluated_is_what_was_clustered(run_dir: Path, shards: Path) -> None:
    run, index = Run(run_dir), open_index(shards)
    embed = fresh_embedder(run.recipe)  # round 0 was made from the initial weights
    clustered = np.load(run.round(0) / "features" / "rows.npy").astype(np.float32)
    whitening = read_whitening(run.round(0))

    def difference(embed: Embedder) -> float:
        rows, _ = labelled_features(embed, index, run.recipe.data)
        return float(np.abs(whitening(rows) - clustered).max())

    assert difference(embed) < 2e-3
    assert difference(replace(embed, precision="fp32")) > 2e-3  # the run's precision is bf16


def test_the_exported_backbone_is_that_of_the_embedder(run_dir: Path, tmp_path: Path) -> None:
    export_run(run_dir, tmp_path / "b.safetensors", "safetensors")
    ours = load_embedder(Run(run_dir)).method.trunk.export_state()
    state = load_backbone(tmp_path / "b.safetensors").export_state()
    assert all(torch.equal(state[key], value) for key, value in ours.items())


@pytest.mark.parametrize("name", ["simclr", "swav", "sela"])
def test_labels_that_only_judge_train_nothing_and_give_class_means(
    name: str, shards: Path, tmp_path: Path
) -> None:
    given = [f"method.name={name}", *CASES[name], "train.epochs=1"]
    for run, seeds in (("plain", []), ("judged", ["seeds={labels: shards, per_class: 5}"])):
        pretrain(tiny_recipe(shards, *given, *seeds), tmp_path / run)
    assert_same_run(tmp_path / "plain", tmp_path / "judged")
    scores = evaluate_run(
        tmp_path / "judged", str(shards), str(shards), ["prototypes", "classifier"]
    )
    assert min(scores[name]["top1"] for name in ("prototypes", "classifier")) > 0.3
    assert not (tmp_path / "plain" / "class_means").exists()


def test_what_needs_seeds_is_skipped_with_a_reason_in_a_run_without_them(
    run_dir: Path, shards: Path
) -> None:
    reasons: list[str] = []
    scores = evaluate_run(run_dir, str(shards), str(shards), emit=reasons.append)
    assert {"knn", "linear", "low_shot_10", "retrieval", "clusters", "baselines"} < set(scores)
    why = f"is not evaluated: {run_dir} was trained without labelled seeds"
    assert "low_shot_1 is not evaluated: 1% of 120 training rows" in reasons[0]
    assert reasons[1:3] == [f"{name} {why}" for name in ("prototypes", "classifier")]
    with pytest.raises(DataError, match="prototypes cannot be evaluated"):
        evaluate_run(run_dir, str(shards), str(shards), ["prototypes"])


def test_an_unknown_evaluator_is_refused_before_an_image_is_read(run_dir: Path) -> None:
    with pytest.raises(RecipeError, match="'svm'; choose from knn"):
        evaluate_run(run_dir, "no-such-shards", "no-such-shards", ["svm"])


def test_scores_are_shown_before_they_are_recorded_and_kept_where_they_cannot_be(
    run_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def refuse(path: Path, record: object) -> None:
        order.append("recorded")
        raise DiskError(f"cannot write {path}: Permission denied")

    monkeypatch.setattr("cluster_jobs.results.evaluate.write_json", refuse)
    scores = evaluate_run(
        run_dir,
        str(shards),
        str(shards),
        ["knn"],
        order.append,
        lambda scores: order.append("shown"),
    )
    assert scores["knn"]["top1"] > 0.3
    assert order[:2] == ["shown", "recorded"]
    assert "the scores are not recorded in the run: cannot write" in order[2]


def test_shards_without_an_index_that_cannot_be_written_beside_them_are_measured(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tiny_shards(tmp_path / "others", n=60)
    shutil.rmtree(others / "deepclust-index", ignore_errors=True)
    write, places = index_build.write, []

    def read_only(folder: Path, *rest: Any, **options: Any) -> None:
        places.append(folder)
        if tmp_path in folder.parents or len(places) == 2:
            raise DiskError(f"cannot write {folder}: Read-only file system")
        write(folder, *rest, **options)

    monkeypatch.setattr(index_build, "write", read_only)
    assert evaluate_run(run_dir, str(others), str(others), ["knn"])["knn"]["top1"] > 0.3
    assert [place.parent.name for place in places[:2]] == ["others", "evaluations"]
    assert not places[2].exists()  # the temporary one
    assert run_dir in places[-1].parents  # the run could be written the next time
    evaluate_run(run_dir, str(others), str(others), ["knn"])
    assert places[-1].parent.name == "others"  # and is opened then


def test_the_weights_of_a_run_that_has_not_finished_are_told(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    lines = (copy / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["event"] != "finished"]
    (copy / "events.jsonl").write_text("\n".join(kept) + "\n")
    told: list[str] = []
    export_run(copy, tmp_path / "a.safetensors", emit=told.append)
    assert "the run has not finished" in told[0]
    assert re.search(r"step \d+, 1 of 1 epochs", told[0])
    newest = Run(copy).checkpoints()[-1] / "model.safetensors"
    newest.write_bytes(b"\0" + newest.read_bytes()[1:])
    told.clear()
    export_run(copy, tmp_path / "b.safetensors", emit=told.append)
    assert "cannot be read" in told[0]
    assert "using the previous one" in told[0]


def test_the_suffix_says_the_format_of_an_export(run_dir: Path, tmp_path: Path) -> None:
    assert export_run(run_dir, tmp_path / "a.safetensors").format == "safetensors"
    assert export_run(run_dir, tmp_path / "a.bin").format == "safetensors"
    with pytest.raises(RecipeError, match="--format torchvision: torchvision has no"):
        export_run(run_dir, tmp_path / "a.pth")


@pytest.fixture(scope="module")
def toy_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch whose method answers classes, three of four with labels."""
    path = tmp_path_factory.mktemp("runs") / "toy"
    index, table = open_index(shards), path.parent / "labels.csv"
    assert index.labels is not None
    assert index.class_names is not None
    pairs = zip(index.keys, index.labels, strict=True)
    rows = [f"{key},{index.class_names[c]}" for key, c in pairs if c < 3]
    table.write_text("\n".join(["key,class", *rows[:60]]))
    seeds = f"seeds={{labels: {table}, share: 0.5}}"
    recipe = tiny_recipe(shards, f"method.name={TOY_METHOD}", *CASES[TOY_METHOD], seeds)
    pretrain(recipe.replace("train.epochs=1", "train.lr=0.05"), path)
    return path


def test_a_method_that_answers_classes_is_judged_by_its_own_answers(
    toy_run: Path, shards: Path
) -> None:
    scores = evaluate_run(toy_run, str(shards), str(shards), ["classifier"])["classifier"]
    embed, index = load_embedder(Run(toy_run)), open_index(shards)
    rows, labels = labelled_features(embed, index, Run(toy_run).recipe.data)
    answers = embed.answer(rows)[:, :3].argmax(1).cpu().numpy()
    assert scores["top1"] == pytest.approx((answers == labels).mean())
    assert scores["top1_open"] >= scores["recall_unlabelled"] == 0 or scores["free"] > 0
    classes = scores["classes"]
    assert classes["rows"] == index.class_names
    assert sum(row[0] for row in classes["values"]) == 60
    assert sum(map(sum, scores["confusion"]["values"])) == 120
    (file,) = (toy_run / "evaluations").glob("*.json")
    assert json.loads(file.read_text())["scores"]["classifier"] == scores
    line = scores_line("classifier", scores)
    assert "top1" in line
    assert "confusion" not in line


def test_clusters_that_seeds_pin_answer_classes(shards: Path, tmp_path: Path) -> None:
    seeds = "seeds={labels: shards, per_class: 5, share: 0.5}"
    pretrain(tiny_recipe(shards, seeds, "train.epochs=1"), tmp_path / "run")
    scores = evaluate_run(tmp_path / "run", str(shards), str(shards), ["classifier"])["classifier"]
    assert scores["top1"] > 0.25
    assert 0 <= scores["free"] < 1
    assert [row[0] for row in scores["classes"]["values"]] == [5] * 4
    net = load_classifier(tmp_path / "run/export/backbone.safetensors")
    assert [net.id2label[i] for i in range(6)] == [*net.classes, "cluster 4", "cluster 5"]


def test_the_classifier_travels_with_the_weights(toy_run: Path, shards: Path) -> None:
    """The export at the end of the run, and one written afterwards, give the run's own logits."""
    embed, index = load_embedder(Run(toy_run)), open_index(shards)
    rows, _ = labelled_features(embed, index, Run(toy_run).recipe.data)
    out = toy_run.parent / "net.safetensors"
    exported = export_run(toy_run, out)
    assert exported.hash == file_hash(toy_run / "export/backbone.safetensors")
    net = load_classifier(out)
    assert index.class_names is not None
    assert net.classes == index.class_names[:3]
    assert net.id2label == {**dict(enumerate(net.classes)), 3: "cluster 3"}
    torch.testing.assert_close(net.method.answer(torch.from_numpy(rows)), embed.answer(rows))
    images = torch.randn(5, 3, 16, 16)
    assert net.classify(images) == [net.id2label[i] for i in net(images).argmax(1).tolist()]
    assert torch.equal(load_backbone(out)(images), net.backbone(images))
    assert "load_classifier" in exported.usage


def test_a_forged_or_changed_classifier_is_refused_by_name(toy_run: Path, tmp_path: Path) -> None:
    good = toy_run / "export/backbone.safetensors"
    tensors, header = load_file(good), load_backbone(good).meta
    about = header["classifier"]
    changes = {
        "import no.such first": {"method": {**about["method"], "name": "no.such"}},
        "not 3 columns": {"names": ["a", "b", "c"]},
        "weights are not those": {"weights": "0"},
        "too many columns": {"cluster": [2**30, 8]},
    }
    for reason, change in changes.items():
        forged = {"deepclust": json.dumps({**header, "classifier": {**about, **change}})}
        save_file(tensors, tmp_path / "forged", metadata=forged)
        with pytest.raises(DataError, match=f"forged: its classifier cannot be built: .*{reason}"):
            load_classifier(tmp_path / "forged")


def test_an_export_without_a_classifier_says_so(run_dir: Path) -> None:
    with pytest.raises(DataError, match="has no classifier"):
        load_classifier(run_dir / "export/backbone.safetensors")

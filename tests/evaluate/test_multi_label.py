"""Images of several classes: probes as scikit-learn fits them, and how labels name classes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from cluster_jobs.report import write_report
from cluster_jobs.results.baselines import Beside
from cluster_jobs.results.evaluate import evaluate_run
from deepclust import open_index
from deepclust.data.pack.pack import pack
from deepclust.errors import DataError
from deepclust.evaluate import evaluate
from deepclust.evaluate.frozen import Frozen, Skipped, Split, freeze
from deepclust.evaluate.multi_label import multi_label
from tests.images import draw, encode

NAMES = ("cat", "dog", "owl")


def frozen(n: int = 400, seed: int = 0) -> tuple[Frozen, np.ndarray]:
    """Features of images that show some of three classes, and which."""
    random = np.random.default_rng(seed)
    truth = random.random((2 * n, 3)) < 0.4
    x = truth @ random.normal(size=(3, 12)) + random.normal(scale=1.5, size=(2 * n, 12))
    texts = ["|".join(np.array(NAMES)[row]) or "|" for row in truth]
    classes = sorted(set(texts))
    labels = np.array([classes.index(text) for text in texts])
    ids = np.arange(n)
    x = x.astype(np.float32)
    halves = Split(x[:n], labels[:n], ids), Split(x[n:], labels[n:], ids)
    return Frozen(classes, *halves), truth


def test_the_scores_are_those_of_scikit_learn() -> None:
    given, truth = frozen()
    ours = dict(multi_label(given))
    n, scaler = len(given.train.labels), StandardScaler().fit(given.train.features)
    model = OneVsRestClassifier(LogisticRegression(C=ours["C"], tol=1e-8, max_iter=10_000))
    model.fit(scaler.transform(given.train.features), truth[:n])
    theirs = model.predict_proba(scaler.transform(given.test.features))
    expected = [average_precision_score(truth[n:, c], theirs[:, c]) for c in range(3)]
    assert [row[0] for row in ours["classes"]["values"]] == pytest.approx(expected, abs=0.002)
    assert ours["map"] == pytest.approx(np.mean(expected), abs=0.002)
    assert ours["converged"] == 1
    assert ours["interval"][0] < ours["map"] < ours["interval"][1]
    assert ours["chance"] == pytest.approx(truth[n:].mean())
    assert ours["chance"] < ours["map"] - 0.1
    assert ours["classes"]["rows"] == [*NAMES]


def test_computing_twice_gives_the_same_numbers() -> None:
    assert dict(multi_label(frozen()[0])) == dict(multi_label(frozen()[0]))


def test_a_class_without_a_test_image_has_no_precision() -> None:
    given, truth = frozen()
    owls = truth[len(given.train.labels) :, 2]
    test = Split(*(part[~owls] for part in (given.test.features, given.test.labels, owls)))
    scores = dict(multi_label(Frozen(given.classes, given.train, test)))
    assert scores["classes"]["values"][2][:2] == [None, None]
    assert scores["map"] == pytest.approx(
        np.mean([row[0] for row in scores["classes"]["values"][:2]])
    )


def test_labels_of_one_class_are_refused_with_how_to_write_several() -> None:
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    with pytest.raises(Skipped, match=r"cat\|dog"):
        list(multi_label(freeze((x, y), (x, y))))
    with pytest.raises(DataError, match="multi_label cannot be evaluated"):
        evaluate(freeze((x, y), (x, y)), ["multi_label"])


def shard(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def test_shards_name_several_classes_in_json_and_in_texts(tmp_path: Path) -> None:
    labels = [["dog", "cat"], ["cat"], [], ["cat", "dog"]]
    members: dict[str, bytes] = {}
    for i, own in enumerate(labels):
        members[f"{i}.jpg"] = encode(draw(i, 16, 16), "jpg")
        members[f"{i}.json"] = json.dumps({"classes": own}).encode()
        members[f"{i}.txt"] = ("\n".join(own) or "|").encode()
    shards = shard(tmp_path / "s", members)
    for field in ("json.classes", "txt"):
        index = open_index(shards, labels=field)
        assert index.class_names is not None
        assert [index.class_names[c] for c in index.labels] == ["cat|dog", "cat", "|", "cat|dog"]


def test_a_run_is_scored_beside_pixels_and_random_weights_and_reported(
    final_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(final_run, run)
    members: dict[str, bytes] = {}
    for i in range(60):
        members[f"{i:02}.png"] = encode(draw(i, 16, 16, label=i % 4), "png")
        own = [name for bit, name in enumerate(NAMES[:2]) if (i % 4) >> bit & 1]
        members[f"{i:02}.json"] = json.dumps({"classes": own}).encode()
    shards = str(shard(tmp_path / "s", members))
    beside = Beside(labels="json.classes")
    scores = evaluate_run(run, shards, shards, ["multi_label"], beside=beside)
    assert set(scores["baselines"]) == {"rows", "pixels", "random_weights"}
    assert 0.5 < scores["baselines"]["pixels"]["multi_label"]["map"] <= 1
    assert scores["multi_label"]["map"] > scores["multi_label"]["chance"] == 0.5
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Average precision by class" in page
    assert "multi_label" in page


def test_tables_name_several_classes_with_bars_or_as_lists(tmp_path: Path) -> None:
    paths = [f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        (tmp_path / path).write_bytes(encode(draw(i, 16, 16), "png"))
    with open(tmp_path / "t.csv", "w", newline="") as file:
        rows = zip(["path", *paths], ["labels", "1|0", "1", "|", ""], strict=True)
        csv.writer(file).writerows(rows)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    lists = pa.array([["dog", "cat"], ["dog"], [], None], pa.list_(pa.string()))
    pq.write_table(pa.table({"path": paths, "labels": lists}), tmp_path / "t.parquet")
    wanted = {"0": "cat|dog", "1": "dog", "2": "|", "3": None}
    assert packed(tmp_path, "t.csv", classes=str(tmp_path / "names.txt")) == wanted
    assert packed(tmp_path, "t.parquet") == wanted
    assert packed(tmp_path, "t.csv")["0"] == "0|1"


def packed(folder: Path, source: str, **options: str) -> dict[str, str | None]:
    """The label of each key that `pack` gives."""
    out = folder / f"{source}-{len(options)}"
    pack(folder / source, out, **options)
    index = open_index(out)
    assert index.labels is not None
    assert index.class_names is not None
    names = [*index.class_names, None]
    return {key: names[label] for key, label in zip(index.keys, index.labels, strict=True)}

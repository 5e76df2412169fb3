"""Labels that train nothing name classes all the same: predict, export, evaluate and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pyarrow.parquet import read_table
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cluster_jobs.cli import app
from cluster_jobs.report import write_report
from cluster_jobs.results.evaluate import evaluate_run, labelled_features
from cluster_jobs.results.export import export_run
from cluster_jobs.results.predict import predict
from deepclust import load_backbone, load_classifier, load_run, open_index, pretrain
from deepclust.data.images.crops import to_float
from deepclust.errors import DataError, RecipeError
from deepclust.files import file_hash
from deepclust.run.directory import Run
from deepclust.trained.class_means import by_means
from deepclust.trained.saved import embedder_of, newest
from tests.images import draw, make_image_folder
from tests.methods.cases import CASES
from tests.tiny import assert_predicts_its_assignments, tiny_recipe

NAMES = ("simclr", "swav", "sela")
WEIGHTS = "export/backbone.safetensors"


@pytest.fixture(params=NAMES)
def run(request: pytest.FixtureRequest, judged: dict[str, Path], tmp_path: Path) -> Path:
    """A run to write to, of each kind: without clusters, with answered ones, and with rounds."""
    return Path(shutil.copytree(judged[request.param], tmp_path / request.param))


def probabilities(path: Path, shards: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the class means say of labelled shards, and the truth."""
    run = Run(path)
    saved = newest(run, print)
    named = by_means(run, embedder_of(run, saved), saved.state.step, print)
    rows, labels = labelled_features(named, open_index(shards), run.recipe.data)
    assert labels is not None
    return named.answer(rows).softmax(1).numpy(), labels


def test_new_images_get_the_nearest_class_and_its_probability(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    counts = predict(run, str(shards), tmp_path / "p.parquet", emit=pytest.fail)
    table = read_table(tmp_path / "p.parquet").to_pydict()
    answers, truth = probabilities(run, shards)
    first = [i for i, head in enumerate(table["head"]) if head == 0]
    assert [table["class"][i] for i in first] == [f"class {c}" for c in answers.argmax(1)]
    np.testing.assert_allclose([table["confidence"][i] for i in first], answers.max(1), atol=1e-4)
    assert (answers.argmax(1) == truth).mean() > 0.3
    if Run(run).recipe.assigns:
        assert counts["unit"] == "clusters"
        assert_predicts_its_assignments(run, shards, tmp_path)
    else:
        assert (counts["unit"], counts["k"], counts["round"]) == ("classes", 4, None)
        assert table["cluster"] == answers.argmax(1).tolist()


def test_images_that_cannot_be_read_have_no_class(run: Path, tmp_path: Path) -> None:
    photos = make_image_folder(tmp_path / "photos", n=6, size=24)
    (photos / "class-0" / "broken.png").write_bytes(b"not an image")
    predict(run, str(photos), tmp_path / "p.parquet", emit=print)
    table = read_table(tmp_path / "p.parquet").to_pydict()
    for path, name, sure in zip(table["path"], table["class"], table["confidence"], strict=True):
        assert (name is None) == (sure is None) == path.endswith("broken.png")
    good = [i for i, name in enumerate(table["class"]) if name is not None and not table["head"][i]]
    answer = load_run(run).predict([table["path"][i] for i in good])
    assert answer.classes == [table["class"][i] for i in good]
    sure = [table["confidence"][i] for i in good]
    np.testing.assert_allclose(answer.confidences, sure, atol=1e-4)


def test_a_table_of_values_says_what_the_command_line_says(run: Path, tmp_path: Path) -> None:
    photos, out = make_image_folder(tmp_path / "photos", n=3, size=16), tmp_path / "p.csv"
    call = ["predict", str(run), "--data", str(photos), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["unit"] in done.stderr
    assert "class,confidence" in out.read_text().splitlines()[0].replace('"', "")


def images_of(run: Path, count: int = 8) -> Tensor:
    """Drawn images as the network of a run gets them."""
    data = Run(run).recipe.data
    pixels = torch.stack([draw(i, data.size, data.size, i % 4) for i in range(count)])
    return to_float(pixels, data.mean, data.std)


def test_the_means_travel_with_the_weights_and_the_names(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    exported = export_run(run, out, emit=pytest.fail)
    assert exported.hash == file_hash(run / WEIGHTS)
    assert "load_classifier" in exported.usage
    net, images = load_classifier(out), images_of(run)
    assert net.id2label == {i: f"class {i}" for i in range(4)}
    saved = newest(Run(run), print)
    named = by_means(Run(run), embedder_of(Run(run), saved), saved.state.step, print)
    with torch.no_grad():
        wanted = named.answer(named.method.trunk(images).numpy())
        torch.testing.assert_close(net(images), wanted, atol=1e-4, rtol=1e-4)
    assert net.classify(images) == [f"class {c}" for c in wanted.argmax(1).tolist()]
    assert torch.equal(load_backbone(out)(images), net.backbone(images))


def test_other_files_hold_no_classifier_and_read_no_labelled_image(
    judged: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster_jobs.results.export.answering", None)
    export_run(judged["simclr"], tmp_path / "net.onnx", emit=pytest.fail)


def test_onnx_goes_from_images_to_classes_where_there_are_no_clusters(
    judged: dict[str, Path], tmp_path: Path
) -> None:
    run, out = judged["simclr"], tmp_path / "net.onnx"
    exported = export_run(run, out, emit=pytest.fail, classifier=True)
    scope: dict[str, Any] = {"images": images_of(run).numpy()}
    exec(exported.usage, scope)
    logits = load_classifier(run / WEIGHTS)(images_of(run))
    np.testing.assert_array_equal(scope["clusters"], logits.argmax(1).numpy())
    facts = onnxruntime.InferenceSession(str(out)).get_modelmeta().custom_metadata_map
    assert json.loads(facts["names"]) == [f"class {i}" for i in range(4)]
    export_run(run, tmp_path / "net.safetensors", emit=pytest.fail, classifier=True)
    assert load_classifier(tmp_path / "net.safetensors").classes == json.loads(facts["names"])


def test_a_forged_file_of_means_is_refused(judged: dict[str, Path], tmp_path: Path) -> None:
    good = judged["swav"] / WEIGHTS
    tensors, header = load_file(good), load_backbone(good).meta
    for change in ({"classes": ["a", "b"]}, {"names": ["a"]}, {"method": {"name": "no.such"}}):
        about = {**header, "classifier": {**header["classifier"], **change}}
        save_file(tensors, tmp_path / "forged", metadata={"deepclust": json.dumps(about)})
        with pytest.raises(DataError, match="forged: its classifier cannot be built"):
            load_classifier(tmp_path / "forged")


def test_means_are_judged_and_the_report_shows_them(run: Path, shards: Path) -> None:
    heard: list[str] = []
    scores = evaluate_run(run, str(shards), str(shards), ["classifier"], heard.append)["classifier"]
    answers, truth = probabilities(run, shards)
    assert scores["top1"] == pytest.approx((answers.argmax(1) == truth).mean())
    own = answers[np.arange(len(truth)), truth]
    assert scores["nll"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
    assert 0 <= scores["ece"] < 1
    assert [row[0] for row in scores["classes"]["values"]] == [5] * 4
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (truth, answers.argmax(1)), 1)
    assert scores["confusion"]["values"] == confusion.tolist()
    assert any("nearest class mean" in text for text in heard)
    page = write_report(run, run / "report.html").read_text()
    for words in ("Its own answers", "nearest class mean", "Recall by class", "Calibration"):
        assert words in page


def test_a_class_without_a_label_is_judged_too(shards: Path, tmp_path: Path) -> None:
    index = open_index(shards)
    assert index.labels is not None
    pairs = zip(index.keys, index.labels, strict=True)
    rows = [f"{key},class {c}" for key, c in pairs if c < 3][:30]
    (tmp_path / "labels.csv").write_text("\n".join(["key,class", *rows]))
    seeds = f"seeds={{labels: {tmp_path / 'labels.csv'}}}"
    recipe = tiny_recipe(shards, "method.name=simclr", *CASES["simclr"], seeds, "train.epochs=1")
    pretrain(recipe, tmp_path / "run")
    scores = evaluate_run(tmp_path / "run", str(shards), str(shards), ["classifier"])["classifier"]
    assert scores["recall_unlabelled"] == scores["free"] == 0
    assert scores["classes"]["rows"][3] == "class 3"
    assert scores["confusion"]["rows"] == [f"class {i}" for i in range(4)]
    assert "nearest class mean" in write_report(tmp_path / "run", tmp_path / "r.html").read_text()


def test_images_without_means_get_clusters_alone_and_a_method_without_clusters_says_why(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise DataError("the shards are gone")

    shutil.rmtree(run / "class_means")
    monkeypatch.setattr("deepclust.trained.class_means.open_data_index", refuse)
    heard: list[str] = []
    out = tmp_path / "p.parquet"
    if not Run(run).recipe.assigns:
        with pytest.raises(DataError, match="the shards are gone"):
            predict(run, str(shards), out, emit=heard.append)
        return
    predict(run, str(shards), out, emit=heard.append)
    assert heard == ["warning: images have clusters and no class: the shards are gone"]
    assert "class" not in read_table(out).column_names
    export_run(run, tmp_path / "net.safetensors", emit=heard.append)
    assert "the file has no classifier" in heard[-1]
    with pytest.raises(DataError, match="Export a run that has labelled seeds"):
        load_classifier(tmp_path / "net.safetensors")


def test_a_round_of_a_method_without_rounds_is_refused(
    judged: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="has no rounds"):
        predict(judged["simclr"], str(shards), tmp_path / "p.csv", 1, emit=print)

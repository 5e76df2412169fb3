"""New images get the clusters that a run would give them; features of any images are its own."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow.parquet import read_table
from typer.testing import CliRunner

from cluster_jobs.cli import app
from cluster_jobs.results import features
from cluster_jobs.results.embed import EmbedOptions, Given, embed
from cluster_jobs.results.predict import predict
from deepclust import load_backbone, load_run, open_index
from deepclust.errors import DataError, RecipeError, RunDiffersError
from deepclust.files import read_json
from deepclust.run.best import keep_best
from deepclust.run.directory import Run, is_done
from deepclust.run.lock import hold
from deepclust.run.round_files import read_array
from tests.cluster_jobs.synthetic import make_simclr
from tests.images import draw, encode, make_image_folder, make_shards
from tests.tiny import assert_predicts_its_assignments

WEIGHTS = "export/backbone.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that no run has seen, one of which is none."""
    folder = make_image_folder(tmp_path_factory.mktemp("new") / "photos", n=20, size=24)
    (folder / "class-0" / "broken.png").write_bytes(b"not an image")
    return folder


def predicted(run: Path, images: Path, folder: Path) -> dict[str, list]:
    predict(run, str(images), folder / "p.parquet", emit=print)
    return read_table(folder / "p.parquet").to_pydict()


def test_a_run_predicts_its_own_assignments_where_samples_were_moved_too(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    assert_predicts_its_assignments(final_run, shards, tmp_path)


def test_clusters_of_round_before_are_predicted_with_the_weights_of_then(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    counts = predict(final_run, str(shards), tmp_path / "p.parquet", 1, emit=print)
    table = read_table(tmp_path / "p.parquet")["cluster"].to_pylist()
    assert counts["round"] == 1
    assert (
        table == read_array(Run(final_run).round(1) / "assignments", "assignments.npy")[0].tolist()
    )


def test_new_images_have_cluster_class_second_best_and_path(
    final_run: Path, photos: Path, tmp_path: Path
) -> None:
    table = predicted(final_run, photos, tmp_path)
    (bad,) = (i for i, path in enumerate(table["path"]) if path.endswith("broken.png"))
    good = [i for i in range(21) if i != bad]
    assert (table["cluster"][bad], table["distance"][bad]) == (-1, None)
    assert table["reason"][bad]
    assert all(table["cluster"][i] != table["second"][i] for i in good)
    assert all(table["margin"][i] >= 0 for i in good)
    named = {table["cluster"][i]: table["class"][i] for i in good}
    assert all(name is None or name.startswith("class ") for name in named.values())
    assert not any(name.startswith("deepclust-index") for name in map(str, photos.iterdir()))


def test_from_python_images_get_the_same_clusters_and_features(
    final_run: Path, photos: Path, tmp_path: Path
) -> None:
    table, run = predicted(final_run, photos, tmp_path), load_run(final_run)
    good = [i for i, cluster in enumerate(table["cluster"]) if cluster >= 0]
    paths = [table["path"][i] for i in good]
    answer = run.predict(paths)
    assert answer.clusters.tolist() == [table["cluster"][i] for i in good]
    assert answer.classes == [table["class"][i] for i in good]
    images = [Image.open(path) for path in paths[:3]]
    arrays = [np.array(image.convert("RGB")) for image in images]
    for forms in (images, arrays, [torch.from_numpy(a).permute(2, 0, 1) for a in arrays]):
        np.testing.assert_allclose(run.embed(forms), run.embed(paths[:3]), atol=1e-5)
    assert len(run.predict([]).clusters) == 0


def test_what_is_no_image_is_named(final_run: Path, photos: Path) -> None:
    run = load_run(final_run)
    for image in (photos / "class-0" / "broken.png", photos / "nothing.png", 7, np.zeros((3, 3))):
        with pytest.raises(DataError, match=r"image 0|nothing.png"):
            run.predict([image])
    with pytest.raises(DataError, match=r"\[image\]"):
        run.predict("a.png")


def test_features_are_those_of_the_exported_weights_by_sample_id(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    for source, out in ((final_run, "run"), (final_run / WEIGHTS, "file")):
        options = EmbedOptions(dtype="float32")
        embed(source, str(shards), tmp_path / out, options, emit=print)
    rows = np.load(tmp_path / "run" / "features.npy")
    assert rows.shape == (300, load_backbone(final_run / WEIGHTS).dim)
    np.testing.assert_allclose(rows, np.load(tmp_path / "file" / "features.npy"), atol=1e-4)
    table = read_table(tmp_path / "run" / "samples.parquet").to_pydict()
    assert table["key"] == list(open_index(shards).keys)


def test_whitened_features_are_the_rows_of_the_final_round(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    options = EmbedOptions(whiten=True, format="parquet")
    embed(final_run, str(shards), tmp_path / "out", options, emit=print)
    rows = np.stack(read_table(tmp_path / "out" / "features.parquet")["feature"].to_numpy())
    run = Run(final_run)
    np.testing.assert_array_equal(rows, read_array(run.round(2) / "features", "rows.npy"))


def test_two_ranks_share_the_chunks_and_write_the_bytes_of_one(
    final_run: Path, many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = final_run / WEIGHTS, EmbedOptions(dtype="float32")
    embed(source, str(many_shards), tmp_path / "one", options, emit=print)
    honest, there = features.extract, []

    def watched(context: Any, embedding: Any) -> None:
        there.extend(sorted(path.name[5:10] for path in context.raw_dir.glob("unit-*")))
        honest(context, embedding)

    monkeypatch.setattr(features, "extract_share", lambda *rest: None)  # of rank 0, not of rank 1
    monkeypatch.setattr(features, "extract", watched)
    embed(source, str(many_shards), tmp_path / "two", options, emit=print, given=Given(ranks=2))
    assert there == ["00001", "00003"]  # rank 0 then makes what is missing
    for name in ("features.npy", "samples.parquet", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(RecipeError, match="--ranks 0: give 1"):
        embed(source, "", tmp_path / "no", options, emit=print, given=Given(ranks=0))


def test_the_best_checkpoint_is_embedded_where_it_is_asked_for(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(final_run, tmp_path / "run"))
    first, last = Run(run).checkpoints()[0], Run(run).checkpoints()[-1]
    with hold(run) as token:
        keep_best(Run(run, token), int(first.name), 0.5, "x")
    for name, given in (("best", Given(best=True)), ("last", Given())):
        embed(run, str(shards), tmp_path / name, EmbedOptions(), emit=print, given=given)
    steps = [read_json(tmp_path / n / "manifest.json")["weights"] for n in ("best", "last")]
    assert steps == [{"step": int(first.name)}, {"step": int(last.name)}]
    rows = [np.load(tmp_path / name / "features.npy") for name in ("best", "last")]
    assert not np.array_equal(*rows)
    with pytest.raises(RecipeError, match="is not a run: leave --best out"):
        embed(
            run / WEIGHTS, "", tmp_path / "no", EmbedOptions(), emit=print, given=Given(best=True)
        )


def test_any_layer_can_be_embedded_and_a_wrong_name_lists_them(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    manifest = embed(
        final_run, str(shards), tmp_path / "out", EmbedOptions(layer="blocks.0"), emit=print
    )
    assert manifest["shape"][0] == 300
    with pytest.raises(RecipeError, match="the backbone has blocks"):
        embed(final_run, str(shards), tmp_path / "no", EmbedOptions(layer="block"), emit=print)


def test_a_stopped_embedding_continues_and_another_one_is_refused(
    final_run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, honest = tmp_path / "out", features.project
    monkeypatch.setattr(features, "project", None)  # dies after the chunks
    with pytest.raises(TypeError):
        embed(final_run, str(shards), out, EmbedOptions(), emit=print)
    assert is_done(out / "work" / "raw")
    monkeypatch.setattr(features, "project", honest)
    monkeypatch.setattr(features, "extract", honest_or_nothing)
    first = embed(final_run, str(shards), out, EmbedOptions(), emit=print)
    assert embed(final_run, str(shards), out, EmbedOptions(), emit=print) == first
    with pytest.raises(RunDiffersError, match="dtype float16, not float32"):
        embed(final_run, str(shards), out, EmbedOptions(dtype="float32"), emit=print)
    assert not (out / "work").exists()


def honest_or_nothing(context: features.ExtractContext, embed: object) -> None:
    """Chunks that are there need no network."""
    features.raw_chunk.check(context.chunk_path(0))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (EmbedOptions(dtype="int8"), "--dtype int8"),
        (EmbedOptions(format="csv"), "--format csv"),
        (EmbedOptions(layer="norm", whiten=True), "not of a --layer"),
    ],
)
def test_options_that_do_not_go_together_say_what_does(
    final_run: Path, shards: Path, tmp_path: Path, options: EmbedOptions, why: str
) -> None:
    with pytest.raises(RecipeError, match=why):
        embed(final_run, str(shards), tmp_path / "out", options, emit=print)


def test_bad_input_of_both_verbs_is_a_clear_error(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(RecipeError, match="not empty"):
        embed(final_run, str(shards), tmp_path / "full", EmbedOptions(), emit=print)
    whiten = EmbedOptions(whiten=True)
    with pytest.raises(RecipeError, match="no whitening"):
        embed(final_run / WEIGHTS, str(shards), tmp_path / "out", whiten, emit=print)
    with pytest.raises(DataError, match="does not exist"):
        embed(tmp_path / "none", str(shards), tmp_path / "out", EmbedOptions(), emit=print)
    simclr = make_simclr(tmp_path / "simclr", make_shards(tmp_path / "shards"))
    with pytest.raises(RecipeError, match="no clusters"):
        predict(simclr, str(shards), tmp_path / "p.csv", emit=print)
    with pytest.raises(RecipeError, match=r"\*.parquet or \*.csv"):
        predict(final_run, str(shards), tmp_path / "p.xlsx", emit=print)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="can be read"):
        predict(final_run, str(tmp_path / "photos"), tmp_path / "p.csv", emit=print)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".deepclust-")]


def test_both_verbs_print_json_on_stdout_and_the_rest_on_stderr(
    final_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode(draw(0, 16, 16)))
    call = partial(CliRunner().invoke, app)
    data = ["--data", str(tmp_path / "photos")]
    table, out = str(tmp_path / "p.csv"), str(tmp_path / "e")
    done = call(["predict", str(final_run), *data, "--out", table, "--json"])
    assert json.loads(done.stdout)["images"] == 1
    done = call(["embed", str(final_run / WEIGHTS), *data, "--out", out, "--json"])
    assert json.loads(done.stdout)["shape"][0] == 1
    assert "wrote" in done.stderr
    done = call(["predict", str(final_run), "--data", str(tmp_path / "no"), "--out", table])
    assert isinstance(done.exception, DataError)


def test_a_run_without_its_final_round_says_that_weights_and_clusters_differ(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    run, said = tmp_path / "run", []
    shutil.copytree(final_run, run)
    shutil.rmtree(run / "rounds" / "0002")
    kept = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in kept if '"round": 2' not in line))
    for folder in Run(run).checkpoints()[:-1]:
        shutil.rmtree(folder)
    predict(run, str(shards), tmp_path / "p.parquet", emit=said.append)
    assert any("weights of step 24 are newer" in text for text in said)

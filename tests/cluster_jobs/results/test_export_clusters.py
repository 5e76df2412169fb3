"""An export with the classifier says of images what `deepclust predict` says of them.

Other kernels sum in another order, and rows are rounded to float16. So where two clusters are
nearly as far (`TIES`) the answers may differ, and a test counts how many those are. Samples that a
round has moved to fill a cluster (`moved.npy`) are known by their id alone, so they are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.compute as pc
import pytest
import safetensors.torch
import torch
from pyarrow.parquet import read_table
from torch import Tensor
from typer.testing import CliRunner

from cluster_jobs.cli import app
from cluster_jobs.results.export import export_run
from cluster_jobs.results.predict import predict
from deepclust import load_backbone, load_classifier, load_clusters, open_index, pretrain
from deepclust.data.images.crops import CentreCrop, Crop, to_float
from deepclust.data.read.loader import Loader, Request
from deepclust.errors import DataError, RecipeError
from deepclust.run.directory import Run, has_file
from deepclust.run.round_files import read_array
from deepclust.trained.cluster_head import TIES
from deepclust.trained.trained_run import labeller_of
from tests.methods.cases import CASES
from tests.tiny import tiny_recipe

METHODS = ("deepcluster", "deepercluster", "deepcluster-v2", "sela", "swav")  # of every rule


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every kind of rule."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in METHODS:
        final = () if name == "swav" else ("cluster.final=true",)
        overrides = (f"method.name={name}", *CASES[name], *final, "train.epochs=1")
        pretrain(tiny_recipe(shards, *overrides), folder / name)
    return {name: folder / name for name in METHODS}


def normalised(run: Path, shards: Path) -> Tensor:
    """The images of shards as the network of a run gets them."""
    data, index = Run(run).recipe.data, open_index(shards)
    ids, crop = np.arange(len(index)), Crop(CentreCrop(data.size, data.short_side))
    (loaded,) = Loader(index, 0).stream([Request(ids, positions=ids, key=0, crops=(crop,))])
    return to_float(loaded.images[0], data.mean, data.std)


def unmoved(run: Path, n: int) -> np.ndarray:
    """Which samples a run has put where their rows say."""
    stage = Run(run).round(Run(run).rounds()[-1]) / "assignments" if Run(run).rounds() else None
    keep = np.ones(n, bool)
    if stage is not None and has_file(stage, "moved.npy"):
        moved = read_array(stage, "moved.npy")
        keep[moved[moved[:, 0] == 0, 1]] = False
    return keep


def assert_answers_as_predict(
    run: Path, shards: Path, folder: Path, clusters: np.ndarray, distances: np.ndarray
) -> None:
    """Every clear case agrees, and nearly all are clear."""
    predict(run, str(shards), folder / "p.parquet", emit=print)
    table = read_table(folder / "p.parquet")
    table = table.filter(pc.equal(table["head"], 0))
    theirs, margins, theirs_far = (
        table[name].to_numpy() for name in ("cluster", "margin", "distance")
    )
    mine, far = (x if x.ndim == 1 else x[:, 0] for x in (clusters, distances))
    keep = unmoved(run, len(theirs)) & (theirs >= 0)
    clear = keep & (np.abs(margins) > TIES)
    np.testing.assert_array_equal(mine[clear], theirs[clear])
    assert (mine[keep] == theirs[keep]).mean() > 0.99
    assert np.abs(far - theirs_far)[keep].max() < TIES


@pytest.mark.parametrize("name", METHODS)
def test_onnx_runtime_gives_the_clusters_of_predict(
    name: str, runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "net.onnx"
    exported = export_run(runs[name], out, classifier=True, emit=print)
    scope: dict[str, Any] = {"images": normalised(runs[name], shards).numpy()}
    exec(exported.usage, scope)
    assert_answers_as_predict(
        runs[name], shards, tmp_path, scope["clusters"], np.asarray(scope["distances"])
    )
    session = onnxruntime.InferenceSession(str(out))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["names"])[3] == "cluster 3"
    assert len(json.loads(facts["mean"])) == 3


def test_a_program_of_torch_names_the_classes_of_the_seeds(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "net.pt2"
    exported = export_run(final_run, out, classifier=True, emit=print)
    scope: dict[str, Any] = {"images": normalised(final_run, shards)}
    exec(exported.usage, scope)
    assert_answers_as_predict(
        final_run, shards, tmp_path, scope["clusters"].numpy(), scope["distances"].detach().numpy()
    )
    extra = {"deepclust.json": ""}
    torch.export.load(out, extra_files=extra)
    classes = labeller_of(Run(final_run)).classes
    assert classes is not None
    names = json.loads(extra["deepclust.json"])["names"]
    assert names == [one or f"cluster {j}" for j, one in enumerate(classes[:-1])]


@pytest.mark.parametrize("name", ["deepcluster", "deepercluster", "sela"])
def test_a_file_of_weights_carries_the_rule(
    name: str, runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "net.safetensors"
    exported = export_run(runs[name], out, classifier=True, emit=print)
    scope: dict[str, Any] = {}
    exec(exported.usage, scope)
    with torch.no_grad():
        clusters, distances, _ = scope["tell"](scope["net"](normalised(runs[name], shards)))
    assert_answers_as_predict(runs[name], shards, tmp_path, clusters.numpy(), distances.numpy())
    plain = export_run(runs[name], tmp_path / "plain.safetensors", emit=print)
    assert plain.weights == exported.weights
    with pytest.raises(DataError, match="has no clusters"):
        load_clusters(plain.path)


@pytest.mark.parametrize(
    ("format_", "file", "beside"),
    [
        ("torchvision", "net.pth", "net.clusters.safetensors"),
        ("timm", "net.safetensors", "net.clusters.safetensors"),
        ("hf", "net", "net/clusters.safetensors"),
    ],
)
def test_weights_of_other_libraries_have_the_rule_beside_them(
    format_: str, file: str, beside: str, resnet: Path, shards: Path, tmp_path: Path
) -> None:
    export_run(resnet, tmp_path / file, format_, emit=print, classifier=True)
    head = load_clusters(tmp_path / beside)
    net = load_backbone(resnet / "export" / "backbone.safetensors")
    with torch.no_grad():
        clusters, distances, _ = head(net(normalised(resnet, shards)))
    assert_answers_as_predict(resnet, shards, tmp_path, clusters.numpy(), distances.numpy())
    assert head.names[2] == "cluster 2"


def test_a_method_that_answers_itself_is_its_own_classifier(
    runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "net.safetensors"
    export_run(runs["swav"], out, classifier=True, emit=print)
    net = load_classifier(out)
    with torch.no_grad():
        clusters = net(normalised(runs["swav"], shards)).argmax(1).numpy()
    predict(runs["swav"], str(shards), tmp_path / "p.parquet", emit=print)
    theirs = read_table(tmp_path / "p.parquet")["cluster"].to_numpy()
    assert (clusters == theirs).mean() > 0.99
    assert net.id2label[5] == "cluster 5"


def test_what_cannot_hold_it_is_refused_with_what_can(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("deepcluster-v2", "swav"):
        format_ = "safetensors" if name == "deepcluster-v2" else "timm"
        with pytest.raises(RecipeError, match="use --format onnx or torch-export"):
            export_run(runs[name], tmp_path / "a.safetensors", format_, classifier=True, emit=print)
    assert not list(tmp_path.iterdir())


def test_a_forged_or_damaged_rule_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    export_run(runs["deepcluster"], out, classifier=True, emit=print)
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(out)
    changed = {**tensors, "clusters/centroids": tensors["clusters/centroids"] + 1}
    safetensors.torch.save_file(changed, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(DataError, match="not those that were exported"):
        load_clusters(tmp_path / "a.safetensors")
    header = json.loads(metadata["deepclust"])
    for key, value in (("rule", "eval"), ("names", []), ("dim", 7), ("rows", 3)):
        header["clusters"] = {**header["clusters"], key: value}
        forged = {"deepclust": json.dumps(header)}
        safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", metadata=forged)
        with pytest.raises(DataError, match="cannot be built"):
            load_clusters(tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="does not exist"):
        load_clusters(tmp_path / "none")


def test_the_command_writes_it(runs: dict[str, Path], tmp_path: Path) -> None:
    out = str(tmp_path / "net.onnx")
    done = CliRunner().invoke(
        app, ["export", str(runs["deepcluster"]), "--out", out, "--classifier"]
    )
    assert done.exit_code == 0
    assert "clusters, distances, margins" in done.stderr

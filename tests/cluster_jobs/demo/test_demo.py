"""The demo on real images, from idx files to report; and what it says when there are none."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from cluster_jobs.demo import fashion_mnist
from deepclust.errors import DataError
from deepclust.run.directory import Run
from tests.tiny import deepclust


@pytest.mark.slow
def test_the_demo_ends_with_a_table_a_report_and_weights(tmp_path: Path) -> None:
    if not fashion_mnist.complete(fashion_mnist.INSTALLED):
        pytest.skip(f"needs Fashion-MNIST: apt-get install {fashion_mnist.PACKAGE}")
    fewer_images(tmp_path / "data" / "fashion-mnist", train=1500, t10k=500)
    run, size = tmp_path / "run", ("train.epochs=1", "cluster.k=20", "cluster.iterations=3")
    done = deepclust("demo", "--run", run, "--data", tmp_path / "data", *size)
    assert "knn: top1" in done.stdout
    assert "evaluating on the test images (the only use of the labels)" in done.stderr
    assert "clusters: nmi" in done.stdout
    assert str(run / "report.html") in done.stdout
    assert (run / "report.html").stat().st_size > 100_000  # charts and galleries are inside
    assert load_file(run / "export" / "backbone.safetensors")
    assert len(Run(run).metrics("round")) == 2  # and the final one


def fewer_images(folder: Path, **counts: int) -> None:
    """The first images of the real files, and their labels, where the demo looks first."""
    folder.mkdir(parents=True)
    for split, count in counts.items():
        for name, header, row in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            name = f"{split}-{name}-ubyte"
            with gzip.open(fashion_mnist.INSTALLED / f"{name}.gz") as file:
                data = file.read(header + count * row)
            (folder / name).write_bytes(data[:4] + struct.pack(">i", count) + data[8:])


def test_missing_fashion_mnist_names_the_command_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "nothing")
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"Install Debian's dataset-fashion-mnist, or put train-"):
        fashion_mnist.fetch(tmp_path / "here")

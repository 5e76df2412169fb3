"""Exports: round trips of both formats, and clear words for what is not an export."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deepclust.errors import DataError, DiskError, NumericalError, RecipeError
from deepclust.export.backbone import export_backbone, load_backbone
from deepclust.models import Backbone, build_backbone

META = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "run": "abc"}


def trained(name: str, **options: bool) -> Backbone:
    """A backbone whose statistics are no longer those of a fresh one."""
    backbone = build_backbone(name, image_size=32, seed=7, **options)
    with torch.no_grad():
        backbone(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return backbone


@pytest.mark.parametrize(
    ("name", "sobel"), [("conv4", False), ("resnet10_small", True), ("timm/resnet10t", True)]
)
def test_safetensors_load_again_bit_for_bit(tmp_path: Path, name: str, sobel: bool) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = trained(name, sobel=sobel).to(memory_format=torch.channels_last)
    export_backbone(backbone, tmp_path / "b.safetensors", "safetensors", meta=META)
    net = load_backbone(tmp_path / "b.safetensors")
    assert not net.training
    assert (net.name, net.dim) == (name, backbone.dim)
    assert net.meta.items() >= {**META, "sobel": sobel, "image_size": 32}.items()
    state = backbone.export_state()
    assert all(torch.equal(state[key], value) for key, value in net.export_state().items())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "densenet121",
        pytest.param("vit_b_32", marks=pytest.mark.slow),
        pytest.param("vgg16_bn", marks=pytest.mark.slow),
    ],
)
def test_torchvision_loads_all_but_its_classifier(tmp_path: Path, name: str) -> None:
    backbone = trained(name)
    exported = export_backbone(backbone, tmp_path / "b.pth", "torchvision", meta=META)
    scope: dict[str, object] = {}  # the lines bring what they need
    exec(exported.usage, scope)
    net = scope["net"]
    assert isinstance(net, torch.nn.Module)
    state = net.state_dict()
    ours = backbone.export_state()
    assert all(torch.equal(state[key], ours[key]) for key in ours)
    left = state.keys() - ours.keys()
    assert {key.split(".")[0] for key in left} <= {"fc", "classifier", "heads"}


def test_equal_weights_give_equal_files_and_hashes(tmp_path: Path) -> None:
    first, second = (
        export_backbone(trained("conv4"), tmp_path / n, "safetensors", meta=META) for n in "ab"
    )
    assert (first.hash, first.weights) == (second.hash, second.weights)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = export_backbone(
        build_backbone("conv4", image_size=32), tmp_path / "c", "safetensors", meta=META
    )
    assert other.weights != first.weights


@pytest.mark.parametrize(("name", "sobel"), [("conv4", False), ("resnet18", True)])
def test_torchvision_refuses_what_it_does_not_have(tmp_path: Path, name: str, sobel: bool) -> None:
    with pytest.raises(RecipeError, match=f"no {name}.*--format safetensors"):
        export_backbone(trained(name, sobel=sobel), tmp_path / "b", "torchvision", meta={})
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_names_those_that_there_are() -> None:
    with pytest.raises(
        RecipeError, match="caffe: choose one of torchvision, safetensors, timm, hf"
    ):
        export_backbone(trained("conv4"), "b", "caffe", meta={})


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    backbone = trained("conv4")
    torch.nn.init.constant_(backbone.net.get_parameter("blocks.0.0.weight"), torch.nan)
    with pytest.raises(NumericalError, match=r"blocks\.0\.0\.weight"):
        export_backbone(backbone, tmp_path / "b", "safetensors", meta={})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_disk_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(DiskError, match="Free some space"):
        export_backbone(trained("resnet18"), tmp_path / "b.pth", "torchvision", meta={})
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_back_differently_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").write_text("older")
    monkeypatch.setattr(
        "deepclust.export.backbone.load_backbone", lambda path: trained("conv4").train()
    )
    with pytest.raises(DataError, match="other features"):
        export_backbone(trained("conv4"), tmp_path / "b", "safetensors", meta={})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


def broken_files(folder: Path) -> dict[str, Path]:
    """Files that are no exports, each with the reason that the message must give."""
    backbone = build_backbone("conv4", image_size=32)
    good = folder / "good"
    export_backbone(backbone, good, "safetensors", meta=META)
    state, header = backbone.export_state(), load_backbone(good).meta
    changed = {**state, "blocks.0.0.weight": state["blocks.0.0.weight"] + 1}

    def write(name: str, tensors: dict[str, torch.Tensor], header: dict | None) -> Path:
        metadata = header and {"deepclust": json.dumps(header)}
        safetensors.torch.save_file(tensors, folder / name, metadata=metadata)
        return folder / name

    (folder / "cut").write_bytes(good.read_bytes()[:-100])
    torch.save(state, folder / "pth")
    return {
        "absent does not exist": folder / "absent",
        "not a whole safetensors file": folder / "cut",
        "torch.save": folder / "pth",
        "not an exported backbone": write("checkpoint", state, None),
        "header lacks name": write("lacking", state, {"dim": 3}),
        "not those that were exported": write("changed", changed, header),
        "unknown backbone 'conv9'": write("unknown", state, {**header, "name": "conv9"}),
        "cannot build it": write("unfit", state, {**header, "name": "resnet10_small"}),
    }


def test_what_is_not_an_export_is_refused_with_its_name_and_reason(tmp_path: Path) -> None:
    for reason, path in broken_files(tmp_path).items():
        with pytest.raises(DataError, match=reason) as caught:
            load_backbone(path)
        assert str(path) in str(caught.value)

"""Exports for other libraries: each of them loads its file and gives the same features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepclust.errors import DataError, RecipeError
from deepclust.export import elsewhere
from deepclust.export.backbone import export_backbone
from deepclust.models import Backbone, build_backbone

META = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize": 36, "method": "swav"}
CASES = [
    ("timm", "resnet18", False),
    ("hf", "timm/vit_tiny_patch16_224", False),
    ("onnx", "conv4", True),
    ("torch-export", "conv4", True),
]


def trained(name: str, sobel: bool = False) -> Backbone:
    """A backbone whose statistics are no longer those of a fresh one."""
    backbone = build_backbone(name, image_size=32, seed=7, sobel=sobel)
    with torch.no_grad():
        backbone(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return backbone


def loaded(usage: str) -> Callable[[Tensor], Tensor]:
    """What the lines of a usage load, as a map of images."""
    scope: dict[str, Any] = {}
    lines = [line for line in usage.splitlines() if not line.startswith("features")]
    exec("\n".join(lines), scope)
    net = scope["net"]
    if hasattr(net, "get_inputs"):
        return lambda images: torch.from_numpy(net.run(None, {"images": images.numpy()})[0])
    if hasattr(net, "timm_model"):
        return lambda images: net.eval()(images).pooler_output
    return net if type(net).__name__ == "GraphModule" else net.eval()


@pytest.mark.parametrize(("format_", "name", "sobel"), CASES)
def test_a_library_loads_its_format_and_gives_the_same_features(
    format_: str, name: str, sobel: bool, tmp_path: Path
) -> None:
    backbone = trained(name, sobel).to(memory_format=torch.channels_last).train()
    out = tmp_path / ("net.safetensors" if format_ == "timm" else "net")
    exported = export_backbone(backbone, out, format_, meta=META)
    assert backbone.training  # it is left as it was
    net, images = loaded(exported.usage), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = backbone.eval()(images)
        torch.testing.assert_close(net(images), expected, atol=1e-4, rtol=1e-4)


def test_a_hugging_face_folder_says_how_images_are_prepared(tmp_path: Path) -> None:
    import timm

    export_backbone(trained("resnet18"), tmp_path / "net", "hf", meta=META)
    config = timm.data.resolve_model_data_config(
        timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True)
    )
    assert list(config["mean"]) == META["mean"]
    assert list(config["input_size"]) == [3, 32, 32]
    assert config["crop_pct"] == pytest.approx(32 / 36)
    assert "swav" in (tmp_path / "net" / "README.md").read_text()
    with pytest.raises(DataError, match="give --out a new folder"):
        export_backbone(trained("resnet18"), tmp_path / "net", "hf", meta=META)


def test_a_network_that_timm_has_not_is_refused_with_the_formats_that_hold_it(
    tmp_path: Path,
) -> None:
    for name, sobel in (("conv4", False), ("resnet18", True), ("vgg16_bn", False)):
        with pytest.raises(RecipeError, match="Use --format onnx, torch-export or safetensors"):
            elsewhere.check(build_backbone(name, image_size=32, sobel=sobel), "timm")


def test_timm_knows_a_file_by_its_suffix(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"end it in \.safetensors"):
        export_backbone(trained("resnet18"), tmp_path / "net.pth", "timm", meta=META)


def test_a_file_that_gives_other_features_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = elsewhere.TARGETS["torch-export"]
    other = build_backbone("conv4", image_size=32, seed=8).eval()
    changed = elsewhere.Target((), target.write, lambda backbone, path: other, target.usage)
    monkeypatch.setitem(elsewhere.TARGETS, "torch-export", changed)
    with pytest.raises(DataError, match="gives other features"):
        export_backbone(trained("conv4"), tmp_path / "net", "torch-export", meta=META)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'deepclust\[export\]'"):
        elsewhere.check(trained("conv4"), "onnx")

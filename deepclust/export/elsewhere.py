"""Exports that other libraries load without deepclust: timm, Hugging Face, ONNX, torch.export.

- `timm`: a safetensors file of timm's names, for `timm.create_model(NAME, checkpoint_path=FILE)`.
- `hf`: a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)` and for transformers'
  `AutoModel` and `AutoImageProcessor`, with a model card. It can be pushed to the hub as it is.
- `onnx`: one file, any number of images in a batch. Normalisation is in its metadata.
- `torch-export`: a program of torch.export, any number of images in a batch.

timm knows timm's networks, and of torchvision's the residual and dense ones, which it has by the
same names. Sobel filters are part of the program in the last two formats. timm has none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

import deepclust
from deepclust import files
from deepclust.errors import DataError, RecipeError
from deepclust.export.program import PROGRAMS, Traced
from deepclust.models import Backbone, libraries

SAME_IN_TIMM = ("resnet", "resnext", "wide_resnet", "densenet")  # of torchvision's, by name
OUTPUT = "features"
NOTHING: Mapping[str, bytes] = MappingProxyType({})
TOLERANCE = 1e-3  # of the largest feature: other kernels sum in another order

Reloaded = Callable[[Float[Tensor, "b 3 s s"]], Float[Tensor, "b dim"]]


@dataclass(frozen=True)
class Target:
    """A format: what it needs, how it is written and read again, and lines that load it."""

    packages: tuple[str, ...]
    write: Callable[[Backbone, Path, dict[str, Any]], None]
    read: Callable[[Backbone, Path], Reloaded]
    usage: Callable[[Backbone, Path], str]
    timm: bool = False
    folder: bool = False


def check(backbone: Backbone, format: str) -> None:
    """Raise `RecipeError` where a package is missing, or timm has no such network."""
    missing = [name for name in TARGETS[format].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"--format {format} needs {', '.join(missing)}: pip install 'deepclust[export]'"
        )
    if TARGETS[format].timm and timm_name(backbone) is None:
        what = backbone.name + (" with Sobel input" if backbone.sobel is not None else "")
        raise RecipeError(
            f"--format {format}: timm has no {what}. Use --format onnx, torch-export or "
            "safetensors, which hold any backbone"
        )


def write(
    backbone: Backbone,
    path: Path,
    format: str,
    meta: dict[str, Any],
    beside: Mapping[str, bytes] = NOTHING,
) -> None:
    """Write a backbone, read it back and compare.

    `path` is a new file, or a new folder for `hf`, which gets the files `beside` too. `backbone` is
    in eval mode, on the CPU.
    """
    target = TARGETS[format]
    if format == "timm" and path.suffix != ".safetensors":
        raise RecipeError(
            f"--out {path}: timm knows a file by its suffix, so end it in .safetensors"
        )

    def fill(place: Path) -> None:
        with quiet():
            target.write(backbone, place, meta)
            compare(backbone, target.read(backbone, place))

    def fill_folder(place: Path) -> None:
        fill(place)
        for name, content in beside.items():
            (place / name).write_bytes(content)

    if target.folder:
        if path.exists():
            raise DataError(f"{path} exists: give --out a new folder")
        files.atomic_folder(path, fill_folder, lambda: None)
    else:
        with files.atomic_file(path) as partial:
            fill(partial)


def timm_name(backbone: Backbone) -> str | None:
    """Return the name of the same network in timm, None where it has none."""
    if backbone.sobel is not None or not libraries.has_timm():
        return None
    own = backbone.torchvision is not None and backbone.name.startswith(SAME_IN_TIMM)
    name = backbone.name.removeprefix("timm/")
    is_timm = backbone.torchvision is None and libraries.is_timm(name)
    return name if own or is_timm else None


@torch.no_grad()
def compare(backbone: Backbone, reloaded: Reloaded) -> None:
    """Raise `DataError` unless both give the same features of some batches, nearly."""
    random = torch.Generator().manual_seed(0)
    size = backbone.image_size
    for count in (1, 3):
        images = torch.randn(count, 3, size, size, generator=random)
        mine, theirs = backbone(images), reloaded(images)
        away = float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1e-12))
        if mine.shape != theirs.shape or not away <= TOLERANCE:
            raise DataError(
                f"the file, read back, gives other features (by {away:.2g} of the largest); "
                "nothing was written. Use another format, and report this"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' talk off the terminal, not their errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _timm_config(backbone: Backbone, meta: dict[str, Any]) -> dict[str, Any]:
    """Return timm's config.json, which transformers reads too."""
    name, size = timm_name(backbone), backbone.image_size
    short = int(meta.get("resize", size))
    pretrained = {
        "input_size": [3, size, size], "interpolation": "bilinear", "crop_pct": size / short,
        "crop_mode": "center", "mean": meta.get("mean", [0.0] * 3),
        "std": meta.get("std", [1.0] * 3), "num_classes": 0,
    }  # fmt: skip
    config: dict[str, Any] = {
        "architecture": name, "num_classes": 0, "num_features": backbone.dim,
        "pretrained_cfg": pretrained,
    }  # fmt: skip
    if libraries.patch_of(backbone.net) is not None:
        config["model_args"] = {"img_size": size}
    return config


def _write_timm(backbone: Backbone, path: Path, meta: dict[str, Any]) -> None:
    safetensors.torch.save_file(backbone.export_state(), path, metadata={"format": "pt"})


def _read_timm(backbone: Backbone, path: Path) -> Reloaded:
    net = libraries.timm_net(str(timm_name(backbone)), 3, backbone.image_size)
    net.load_state_dict(safetensors.torch.load_file(path))
    return net.eval()


def _timm_usage(backbone: Backbone, path: Path) -> str:
    size = f", img_size={backbone.image_size}" if libraries.patch_of(backbone.net) else ""
    return (
        f"import timm\nnet = timm.create_model({timm_name(backbone)!r}, num_classes=0{size}, "
        f"checkpoint_path={str(path)!r})"
    )


def _write_hf(backbone: Backbone, path: Path, meta: dict[str, Any]) -> None:
    _write_timm(backbone, path / "model.safetensors", meta)
    files.write_json(path / "config.json", _timm_config(backbone, meta))
    (path / "README.md").write_text(model_card(backbone, meta))


def _read_hf(backbone: Backbone, path: Path) -> Reloaded:
    import timm

    net: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return net.eval()


def _hf_usage(backbone: Backbone, path: Path) -> str:
    return (
        f"import timm\nnet = timm.create_model({'local-dir:' + str(path)!r}, pretrained=True)\n"
        f"from transformers import AutoModel\nnet = AutoModel.from_pretrained({str(path)!r})"
    )


def model_card(backbone: Backbone, meta: dict[str, Any]) -> str:
    """Return a model card: what the network is, how it was trained, how images are prepared."""
    lines = [
        "---", "library_name: timm", "tags: [image-feature-extraction, deepclust]", "---",
        f"# {backbone.name}, trained by {meta.get('method', 'clustering')}", "",
        f"Features of {backbone.dim} numbers, trained without labels by deepclust "
        f"{deepclust.__version__}.", "",
        "| what | value |", "|---|---|",
        f"| network | `{backbone.name}` |",
        f"| images | {backbone.image_size} pixels, of a short side of "
        f"{meta.get('resize', backbone.image_size)} |",
        *(f"| {name} | `{json.dumps(value)}` |" for name, value in sorted(meta.items())),
        "", "Scores and limits are not in this file: see the report of the run.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _traced(backbone: Backbone, meta: dict[str, Any]) -> Traced:
    return Traced(backbone, backbone.image_size, (OUTPUT,), {**meta, "name": backbone.name})


def _program(format: str, *packages: str) -> Target:
    """Return a target whose file is a program of the features alone."""
    program = PROGRAMS[format]

    def write(backbone: Backbone, path: Path, meta: dict[str, Any]) -> None:
        program.write(_traced(backbone, meta), path)

    def read(backbone: Backbone, path: Path) -> Reloaded:
        outputs = program.read(path)
        return lambda images: outputs(images)[0]

    return Target(packages, write, read, lambda backbone, path: program.usage(path, (OUTPUT,)))


TARGETS: dict[str, Target] = {
    "timm": Target(("timm",), _write_timm, _read_timm, _timm_usage, timm=True),
    "hf": Target(("timm",), _write_hf, _read_hf, _hf_usage, timm=True, folder=True),
    "onnx": _program("onnx", "onnx", "onnxscript", "onnxruntime"),
    "torch-export": _program("torch-export"),
}

"""Export a trained backbone, and load it again.

Two formats hold the backbone's weights under the network's own names (`elsewhere.py` has
those of other libraries).

- `torchvision`: a `.pth` state dict of plain tensors (loads with `weights_only=True`) for
  `torchvision.models.NAME()`. It loads with `strict=False`: nothing in it is unexpected, and what
  is missing is the classifier alone (`fc.*`, `classifier.*` or `heads.*`).
- `safetensors`: any backbone. The header says how to build the network, so `load_backbone(path)`
  needs nothing else. The classifier of a run that answers classes lies beside it (`classifier.py`).

A file counts as written once it was read back and gave the same features, bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import deepclust
from deepclust import files
from deepclust.errors import DataError, NumericalError, RecipeError
from deepclust.export import elsewhere
from deepclust.export.preprocess import Preprocess
from deepclust.models import Backbone, build_backbone, libraries

FORMATS = ("torchvision", "safetensors", *elsewhere.TARGETS)
HEADER = "deepclust"  # the key of our JSON in a safetensors header
CLASSIFIER = "classifier"  # the key of what says how to build one, and with a slash its tensors
CLUSTERS = "clusters"  # likewise, of what tells the cluster of features
PARTS = (CLASSIFIER, CLUSTERS)
KEYS = {  # what we put in it
    **dict.fromkeys(("name", "version", "weights"), str),
    **dict.fromkeys(("dim", "image_size"), int),
    "sobel": bool,
}
LARGEST = 2**14  # pixels of an image's side
REMEDY = "Write one with `deepclust export RUN --format safetensors --out FILE`."


@dataclass(frozen=True)
class Head:
    """What travels with a backbone (`PARTS`): what the header says of it, and its tensors.

    `check` raises for a file of which it does not read the same.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    check: Callable[[Path], None]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    format: str
    hash: str
    """blake2b of the file (`deepclust.files.file_hash`)."""
    weights: str
    """sha256 of the weights alone (`weights_hash`); equal weights, equal hash, in both formats."""
    usage: str
    """Lines of Python that load the file."""


def export_backbone(
    backbone: Backbone,
    path: str | Path,
    format: str,
    *,
    meta: dict[str, Any],
    head: Head | None = None,
    clusters: Head | None = None,
    beside: Mapping[str, bytes] = elsewhere.NOTHING,
) -> Exported:
    """Write the backbone to `path` atomically, after it was read back and compared.

    `meta` are JSON values for the safetensors header beside ours (KEYS), such as `mean` and `std`
    of the images. A torchvision file has no place for them, nor for the classifier in `head` or the
    rule in `clusters`. A folder gets the files `beside`.

    Raises `RecipeError` for a format that cannot hold this backbone, `NumericalError` for weights
    that are not finite, `DiskError` for a full disk.
    """
    path = Path(path)
    _check_format(backbone, format)
    state = backbone.export_state()
    _check_finite(state)
    weights = weights_hash(state)
    if format in elsewhere.TARGETS:
        elsewhere.write(_plain(backbone), path, format, meta, beside)
        usage = usage_of(backbone, path, format)
        file = path / "model.safetensors" if path.is_dir() else path
        return Exported(path, format, files.file_hash(file), weights, usage)
    with files.atomic_file(path) as partial:
        if format == "torchvision":
            partial.write_bytes(_pth(state))
            reloaded = _load_torchvision(backbone, partial)
        else:
            parts = {CLASSIFIER: head, CLUSTERS: clusters}
            given = {name: part for name, part in parts.items() if part is not None}
            partial.write_bytes(_with_header(backbone, state, weights, meta, given))
            reloaded = load_backbone(partial)
            for part in given.values():
                part.check(partial)
        _check_same(backbone, reloaded)
    usage = usage_of(backbone, path, format, head)
    return Exported(path, format, files.file_hash(path), weights, usage)


def is_export(path: str | Path) -> bool:
    """Return whether a file has the header of ours; it may be damaged all the same."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return HEADER in (file.metadata() or {})
    except Exception:  # libraries raise what they like
        return False


def load_backbone(path: str | Path) -> Backbone:
    """Return the backbone of a file that `export --format safetensors` wrote.

    It is on the CPU, in eval mode. `net(images)` takes normalised float images [b, 3, h, w] to
    features [b, net.dim]. `net.meta` is the header, where `mean` and `std` say how images were
    normalised in training. `net.preprocess(image)` does it (`preprocess.py`). Nothing in the
    file is executed.

    Raises `DataError` for a file that is broken or not such an export.
    """
    return read_export(path)[0]


def read_export(path: str | Path, part: str = CLASSIFIER) -> tuple[Backbone, dict[str, Tensor]]:
    """Return the backbone of an export as `load_backbone`, and the tensors of one of `PARTS`."""
    path = files.path_of(path, "path")
    meta = _read_header(path)
    with files.reading(path, REMEDY):
        tensors = safetensors.torch.load_file(path)
    state = {k: v for k, v in tensors.items() if not k.startswith(tuple(f"{p}/" for p in PARTS))}
    if weights_hash(state) != meta["weights"]:
        raise DataError(f"{path}: the weights are not those that were exported. Export it again.")
    name, size = meta["name"], meta["image_size"]
    try:
        backbone = build_backbone(name, sobel=meta["sobel"], image_size=size, import_module=False)
        backbone.net.load_state_dict(state)
    except Exception as error:  # a forged header names any network, of any size
        why = (str(error).splitlines() or [""])[0][:500]
        raise DataError(
            f"{path}: holds {name}, written by deepclust {meta['version']}, and this is deepclust "
            f"{deepclust.__version__}, which cannot build it: {why}"
        ) from error
    backbone.meta, backbone.preprocess = meta, Preprocess(meta)
    return backbone.eval(), part_of(tensors, part)


def part_of(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the tensors of one of `PARTS`, by their names in it."""
    own = f"{part}/"
    return {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}


def weights_hash(state: dict[str, Tensor]) -> str:
    """Return the sha256 of names, types, shapes and bytes of CPU tensors, ordered by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pth(state: dict[str, Tensor]) -> bytes:
    """Return the bytes that torch.save writes."""
    # in memory first, because torch.save does not raise an OSError for a full disk
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _check_format(backbone: Backbone, format: str) -> None:
    if format not in FORMATS:
        raise RecipeError(f"--format {format}: choose one of {', '.join(FORMATS)}.")
    if format in elsewhere.TARGETS:
        elsewhere.check(backbone, format)
    if format == "torchvision" and backbone.torchvision is None:
        what = backbone.name + (" with Sobel input" if backbone.sobel is not None else "")
        raise RecipeError(
            f"--format torchvision: torchvision has no {what}. "
            f"Use --format safetensors, and deepclust.load_backbone to read it."
        )


def _check_finite(state: dict[str, Tensor], whose: str = "backbone") -> None:
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise NumericalError(
            f"the {whose}'s {broken[0]} (and {len(broken) - 1} more tensors) hold NaN or "
            f"infinity; nothing was written. Export an earlier checkpoint."
        )


def _with_header(
    backbone: Backbone,
    state: dict[str, Tensor],
    weights: str,
    meta: dict[str, Any],
    parts: dict[str, Head],
) -> bytes:
    """Return the bytes of a safetensors file, with what travels with the backbone."""
    header = _header(backbone, weights, meta)
    for name, part in parts.items():
        _check_finite(part.tensors, name)
        header[name] = part.about
        state = {**state, **{f"{name}/{key}": tensor for key, tensor in part.tensors.items()}}
    return safetensors.torch.save(state, metadata={HEADER: json.dumps(header)})


def _header(backbone: Backbone, weights: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Return the header, where our values replace the caller's of the same name."""
    return {
        **meta,
        "name": backbone.name,
        "dim": backbone.dim,
        "image_size": backbone.image_size,
        "sobel": backbone.sobel is not None,
        "version": deepclust.__version__,
        "weights": weights,
    }


def _read_header(path: Path) -> dict[str, Any]:
    with files.reading(path, REMEDY):
        is_file = path.is_file()
    if not is_file:
        raise DataError(f"{path} does not exist, or is not a file. {REMEDY}")
    if zipfile.is_zipfile(path):  # what torch.save writes
        raise DataError(
            f"{path}: a file of torch.save, of which only safetensors of ours can be read. {REMEDY}"
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # libraries raise what they like for a damaged file
        raise DataError(f"{path}: not a whole safetensors file ({error}). {REMEDY}") from error
    if HEADER not in metadata:
        raise DataError(f"{path}: a safetensors file, but not an exported backbone. {REMEDY}")
    with files.reading(path, REMEDY):
        header: dict[str, Any] = dict(json.loads(metadata[HEADER]))
    wrong = [key for key, kind in KEYS.items() if not files.fits(header.get(key), kind)]
    if wrong:
        raise DataError(f"{path}: its header lacks {', '.join(wrong)}. {REMEDY}")
    if not 0 < header["image_size"] <= LARGEST:
        raise DataError(f"{path}: its header names images of {header['image_size']} pixels")
    return header


def _load_torchvision(backbone: Backbone, path: Path) -> nn.Module:
    """Return the network as a user loads it, without the classifier, which has no weights."""
    assert backbone.torchvision is not None
    with torch.device("meta"):  # draws no random weights
        net = libraries.torchvision_plain(backbone.torchvision, backbone.image_size)
    state = torch.load(path, weights_only=True)
    unexpected = net.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert not unexpected, unexpected
    return libraries.headless(net).float().eval()


@torch.no_grad()
def _check_same(backbone: Backbone, reloaded: nn.Module) -> None:
    """Raise `DataError` unless both give equal features, bit for bit, of one batch on the CPU."""
    original = _plain(backbone)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=random)
    if not torch.equal(original(images), reloaded(images)):
        raise DataError(
            "the file, read back, gives other features; nothing was written. Check the disk, then "
            "export again."
        )


def _plain(backbone: Backbone) -> Backbone:
    """Return a copy on the CPU, in float32 and in eval mode."""
    plain = copy.deepcopy(backbone).cpu().float().eval()
    return plain.to(memory_format=torch.contiguous_format)


def usage_of(backbone: Backbone, path: Path, format: str, head: Head | None = None) -> str:
    """Return lines that load what was written to a path."""
    if format in elsewhere.TARGETS:
        return elsewhere.TARGETS[format].usage(backbone, path)
    if format == "safetensors" and head is not None:
        return (
            "from deepclust import load_backbone, load_classifier\n"
            f"net = load_backbone({str(path)!r})  # features\n"
            f"net = load_classifier({str(path)!r})  # logits, names in net.id2label"
        )
    if format == "safetensors":
        return f"from deepclust import load_backbone\nnet = load_backbone({str(path)!r})"
    size = f"image_size={backbone.image_size}" if backbone.name.startswith("vit_") else ""
    return (
        "import torch\nimport torchvision\n"
        f"net = torchvision.models.{backbone.torchvision}({size})\n"
        f"net.load_state_dict(torch.load({str(path)!r}, weights_only=True), strict=False)"
    )

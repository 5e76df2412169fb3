"""Start weights from anywhere: files of other trainers, torchvision, timm, the Hugging Face hub.

    init.weights=FILE.pth | FILE.safetensors            tensors alone are read, nothing is executed
    init.weights=torchvision:resnet50@IMAGENET1K_V2     without @: torchvision's best
    init.weights=timm:vit_small_patch16_224.dino
    init.weights=hf-hub:OWNER/REPOSITORY                its model.safetensors or pytorch_model.bin

A network is loaded whole or not at all. Libraries download into their usual caches
(TORCH_HOME, HF_HOME), where a machine without a network finds what another one has put there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torchvision
from torch import Tensor

from deepclust.errors import DataError, MissingError, RecipeError
from deepclust.files import reading
from deepclust.models import layouts, libraries
from deepclust.models.backbone import Backbone
from deepclust.models.normalisation import CONFIGS, HUB_FILES, Normalisation, beside

T = TypeVar("T")
OFFLINE = "Download the file where there is a network, and give its path: init.weights=FILE"
REMEDY = (
    "Only tensors are read. Where you trust the file, write them with "
    "torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)"
)


def is_named(source: str) -> bool:
    """Return whether a source is the name of weights in a library, not a path."""
    return source.partition(":")[0] in SCHEMES and ":" in source


def load_foreign(backbone: Backbone, source: str) -> str:
    """Load weights that are not ours, and return what was taken and what was left.

    `source` is a file, or a name by `is_named`. Raises `RecipeError` where they are not those of
    this backbone, with the tensors that do not fit, and `DataError` for what cannot be read.
    """
    scheme, _, name = source.partition(":")
    checkpoint = SCHEMES[scheme](name) if is_named(source) else read_file(Path(source))
    wanted = backbone.net.state_dict()
    matched = layouts.match(checkpoint, wanted)
    if not matched.is_whole:
        raise RecipeError(f"init.weights: {source} {_misfit(backbone, checkpoint, matched)}")
    backbone.net.load_state_dict(matched.state)
    return _taken(source, matched)


def normalisation_of(source: str) -> Normalisation | None:
    """Return how images of weights were normalised, None where nothing says it.

    torchvision and timm know it. Of a hub's repository, and of a file that has the name and the
    neighbours of one, its configuration says it (`normalisation.py`).
    """
    scheme, _, name = source.partition(":")
    if scheme == "torchvision":
        name, _, which = name.partition("@")
        transforms = torchvision.models.get_model_weights(name)[which or "DEFAULT"].transforms()
        return Normalisation(tuple(transforms.mean), tuple(transforms.std))
    if scheme == "timm" and libraries.has_timm():
        import timm

        config = timm.get_pretrained_cfg(name)
        return None if config is None else Normalisation(tuple(config.mean), tuple(config.std))
    if scheme == "hf-hub":
        return beside(_of_hub(name))
    return None if is_named(source) else beside(Path(source))


def read_file(path: Path) -> Mapping[str, Any]:
    """Return what a file of safetensors or of torch.save holds, tensors on the CPU."""
    if not path.is_file():
        raise MissingError(f"init.weights: {path} is missing, or a folder")
    with reading(path, REMEDY):
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of DINO's runs
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise DataError(f"init.weights: {path} holds a {type(loaded).__name__}, not named tensors")
    return loaded


def _taken(source: str, matched: layouts.Match) -> str:
    place = f" under {matched.place}" if matched.place else ""
    texts = [f"{source}: {len(matched.state)} tensors{place}"]
    if matched.resized:
        texts.append(f"{', '.join(matched.resized)} interpolated to this data.size")
    if matched.unused:
        texts.append(f"not used: {layouts.describe(matched.unused)}")
    return "; ".join(texts)


def _misfit(backbone: Backbone, checkpoint: Mapping[str, Any], matched: layouts.Match) -> str:
    """Say why weights are not those of a backbone, and what to change."""
    count = len(backbone.net.state_dict())
    if not matched.state and not matched.misshapen:
        names = layouts.names_in(checkpoint)
        held = f"its tensors are {layouts.describe(names)}" if names else "it holds no tensors"
        return (
            f"has no tensor of a {backbone.name}: {held}. Set backbone.name to the network that "
            "these belong to"
        )
    text = f"has {len(matched.state)} of the {count} tensors of a {backbone.name}"
    text += f" under {matched.place}" if matched.place else ""
    if matched.missing:
        text += f". Missing: {layouts.describe(matched.missing)}"
    if matched.misshapen:
        text += f". Of another shape: {layouts.describe(matched.misshapen)}"
    return f"{text}. Set backbone.name, backbone.sobel and data.size as in its training"


def _torchvision(text: str) -> Mapping[str, Tensor]:
    name, _, which = text.partition("@")
    try:
        weights = torchvision.models.get_model_weights(name)[which or "DEFAULT"]
    except KeyError as error:
        raise RecipeError(f"init.weights: torchvision has no weights {which} of {name}") from error
    except ValueError as error:
        raise RecipeError(f"init.weights: torchvision has no network {name}") from error
    state: Mapping[str, Tensor] = _downloaded(
        text, lambda: weights.get_state_dict(progress=False, check_hash=True)
    )
    return state


def _timm(name: str) -> Mapping[str, Tensor]:
    if not libraries.has_timm():
        raise RecipeError("init.weights=timm:... needs the extra: pip install 'deepclust[timm]'")
    import timm

    if not timm.is_model_pretrained(name):
        raise RecipeError(
            f"init.weights: timm has no weights of {name}: see timm.list_pretrained()"
        )
    state: Mapping[str, Tensor] = _downloaded(
        name, lambda: timm.create_model(name, pretrained=True).state_dict()
    )
    return state


def _hub(text: str) -> Mapping[str, Any]:
    return read_file(_of_hub(text))


def _of_hub(text: str) -> Path:
    """Return the file of weights of a repository, with its configuration beside it."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise RecipeError("init.weights=hf-hub:... needs the extra: pip install 'deepclust[timm]'")
    import huggingface_hub

    repository, _, revision = text.partition("@")
    options: dict[str, Any] = {
        "revision": revision or None,
        "allow_patterns": [*HUB_FILES, *CONFIGS],
    }
    folder = _downloaded(text, lambda: huggingface_hub.snapshot_download(repository, **options))
    for path in (Path(folder, name) for name in HUB_FILES):
        if path.exists():
            return path
    raise DataError(f"init.weights: {repository} has none of {', '.join(HUB_FILES)}")


def _downloaded(what: str, get: Callable[[], T]) -> T:
    """Return what a library downloads, or raise `DataError` with its reason."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub prints what it downloads
            return get()
    except Exception as error:  # each client has its own kinds
        why = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"init.weights: {what} cannot be had: {why}. {OFFLINE}") from error


SCHEMES: dict[str, Callable[[str], Mapping[str, Any]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf-hub": _hub,
}

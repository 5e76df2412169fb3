"""How images of published weights were normalised, as the files beside the weights say.

    config.json                  timm: "pretrained_cfg" has "mean" and "std"
    preprocessor_config.json     transformers: "image_mean" and "image_std"

They count only beside weights with the name that hubs give them (HUB_FILES): a file of another name
may lie in any folder.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
CONFIGS = ("preprocessor_config.json", "config.json")
LARGEST = 1 << 22  # bytes


class Normalisation(NamedTuple):
    """What is taken from the channels of images in [0, 1], and what they are divided by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def beside(weights: Path) -> Normalisation | None:
    """Return what the folder of published weights says, None where it says nothing readable."""
    if weights.name not in HUB_FILES:
        return None
    return in_folder(weights.parent)


def in_folder(folder: Path) -> Normalisation | None:
    """Return what the files of a hub's folder say."""
    for name in CONFIGS:
        config = _read(folder / name)
        timms = config.get("pretrained_cfg")
        about = {**config, **(timms if isinstance(timms, dict) else {})}
        for keys in (("image_mean", "image_std"), ("mean", "std")):
            mean, std = (_numbers(about.get(key)) for key in keys)
            if mean and len(mean) == len(std) and min(std) > 0:
                return Normalisation(mean, std)
    return None


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty for a file that is missing or is none: weights need it not."""
    try:
        if path.stat().st_size > LARGEST:
            return {}
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _numbers(value: Any) -> tuple[float, ...]:
    """Return numbers of channels, none for anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= 4:
        return ()
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in value):
        return ()
    return tuple(map(float, value))

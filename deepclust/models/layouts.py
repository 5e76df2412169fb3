"""Other people's checkpoints: where the tensors of a network are in a file, and under what names.

Trainers wrap a network: `state_dict`, `teacher` or `model` hold it, and its names begin with
`module.`, `backbone.` or `encoder_q.`. Nothing is assumed of these words. The tensors whose names
end in the network's names are counted by what stands before, and the most frequent place counts.
Where a teacher and a student are equally complete the order of `PREFERRED` decides, as the papers
evaluate them: DINO's teacher, MoCo's query encoder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deepclust.models.positions import positions_of

MOST_NESTED = 3  # dictionaries in dictionaries
SILENT = ("module", "_orig_mod")  # what DataParallel, DDP and torch.compile put into names
OPTIONAL = "num_batches_tracked"  # older checkpoints lack it, and nothing of ours reads it
POSITIONS = ("pos_embed", "encoder.pos_embedding")  # timm and DINO, torchvision
PREFERRED = ("teacher", "ema", "state_dict", "model", "encoder_q", "base_encoder", "backbone")
SHOWN = 3  # names of tensors in a message


@dataclass
class Match:
    """The tensors of a network in a checkpoint: by its names, and what does not fit."""

    place: str
    """What stands before the names, such as `teacher/backbone.`."""
    state: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """Names in the same dictionary that the network does not have."""
    resized: list[str] = field(default_factory=list)
    """Positions that were interpolated to another number of patches."""

    @property
    def is_whole(self) -> bool:
        """Whether every tensor of the network is there."""
        return not self.missing and not self.misshapen


def match(checkpoint: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> Match:
    """Return the place of `checkpoint` that has most of a network's tensors, by name and shape.

    `wanted` is the network's state dict. Tensors that only count batches may be missing.
    """
    places = [
        Match(f"{nest}{prefix}", *_fill(tensors, prefix, wanted))
        for nest, tensors in _nests(checkpoint)
        for prefix in _prefixes(tensors, wanted)
    ]
    return max(places, key=_goodness, default=Match("", missing=list(wanted)))


def describe(names: list[str]) -> str:
    """Return some of the names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def names_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of all tensors of a checkpoint."""
    return [f"{nest}{name}" for nest, tensors in _nests(checkpoint) for name in tensors]


def _goodness(one: Match) -> tuple[int, tuple[bool, ...], int]:
    return len(one.state), tuple(word in one.place for word in PREFERRED), -len(one.place)


def _nests(
    tree: Mapping[str, Any], path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dictionary that has tensors, with its path, and names without silent words."""
    own = {_spoken(k): v for k, v in tree.items() if isinstance(v, Tensor)}
    if own:
        yield path, own
    if depth < MOST_NESTED:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from _nests(value, f"{path}{key}/", depth + 1)


def _spoken(name: object) -> str:
    return ".".join(word for word in str(name).split(".") if word not in SILENT)


def _prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Counter[str]:
    """Return what stands before names of the network, and how often."""
    prefixes: Counter[str] = Counter()
    for name in tensors:
        words = name.split(".")
        for cut in range(len(words)):
            if ".".join(words[cut:]) in wanted:
                prefixes["".join(f"{word}." for word in words[:cut])] += 1
    return prefixes


def _fill(
    tensors: Mapping[str, Tensor], prefix: str, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str], list[str], list[str]]:
    state: dict[str, Tensor] = {}
    missing, misshapen, resized = [], [], []
    for name, there in wanted.items():
        given = tensors.get(prefix + name)
        if given is None:
            state.update({name: there} if name.endswith(OPTIONAL) else {})
            missing += [] if name.endswith(OPTIONAL) else [name]
        elif given.shape == there.shape:
            state[name] = given
        elif name in POSITIONS and _is_grid(given) and _is_grid(there):
            side = _side(there)
            state[name] = positions_of(given, side, side)
            resized.append(name)
        else:
            misshapen.append(f"{name} {[*given.shape]}, not {[*there.shape]}")
    unused = [name for name in tensors if name.removeprefix(prefix) not in wanted]
    return state, missing, misshapen, unused, resized


def _side(positions: Tensor) -> int:
    return round(math.sqrt(positions.shape[1] - 1))


def _is_grid(positions: Tensor) -> bool:
    """Return whether these are positions [1, 1 + side^2, d]: of a class token and a square."""
    return positions.ndim == 3 and positions.shape[1] == 1 + _side(positions) ** 2

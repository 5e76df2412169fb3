"""Fine-tuning: the whole network and a new classifier, trained on labels for a few epochs.

The protocol is that of SimCLR (Chen et al. 2020, B.5), smaller: random crops and flips, SGD with
Nesterov momentum, no warm-up. The rate falls by a cosine, and the classifier has its own. There is
no choice by held-out labels, so the settings are the same for every network that is compared. On
1 % and 10 % of the labels the images are those of the low-shot probes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from deepclust.data.images.crops import CentreCrop, Crop, RandomResizedCrop, to_float
from deepclust.data.read.loader import Loader, Request
from deepclust.errors import RecipeError
from deepclust.evaluate.frozen import FineTuning, Frozen, Images, Skipped, Split, Value
from deepclust.evaluate.interval import with_interval
from deepclust.evaluate.low_shot import FEWEST, balanced_rows
from deepclust.models import Backbone
from deepclust.world import derive, generator


def finetune(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield the scores of fine-tuning on all training images, see `finetuned`."""
    yield from finetuned(frozen, 1.0)


def finetune_1(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield the scores of fine-tuning on 1 % of the training images, see `finetuned`."""
    yield from finetuned(frozen, 0.01)


def finetune_10(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield the scores of fine-tuning on 10 % of the training images, see `finetuned`."""
    yield from finetuned(frozen, 0.1)


def finetuned(frozen: Frozen, share: float) -> Iterator[tuple[str, Value]]:
    """Yield "top1" of the test images, a mean over the seeds, "spread", "labels" and "steps".

    "spread" is the difference of the best and the worst seed. Raises `Skipped` for features without
    their images, and where the share gives fewer than two images of each class.
    """
    images, settings = frozen.images, frozen.finetuning
    if images is None:
        raise Skipped("fine-tuning needs a network and its images, and these are features alone")
    train = frozen.train if share == 1 else _part(frozen, share)
    steps = settings.steps(len(train.labels))
    right = [
        _run(images, frozen, train, settings, derive(frozen.seed, "finetune", number))
        for number in range(settings.seeds)
    ]
    tops = [float(one.mean()) for one in right]
    yield from with_interval("top1", np.mean(right, axis=0), frozen.seed)
    yield "spread", max(tops) - min(tops)
    yield "labels", float(len(train.labels))
    yield "steps", float(steps)


def _part(frozen: Frozen, share: float) -> Split:
    train = frozen.train
    each = round(share * len(train.labels) / len(np.unique(train.labels)))
    if each < FEWEST:
        raise Skipped(
            f"{share:.0%} of {len(train.labels)} training images are {each} of each class, and "
            f"{FEWEST} are needed. Evaluate on more images"
        )
    rows = balanced_rows(train.labels, each, frozen.seed)
    return Split(train.features[rows], train.labels[rows], train.sample_ids[rows])


def _run(
    images: Images, frozen: Frozen, train: Split, settings: FineTuning, seed: int
) -> Bool[np.ndarray, " m"]:
    """Train a copy of the network, and return which test images it names right."""
    device = next(images.backbone.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "head"))
        backbone = copy.deepcopy(images.backbone)
        head = nn.Linear(backbone.dim, len(frozen.classes), device=device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        _train(images, backbone, head, train, settings, seed)
        return _right(images, backbone, head, frozen.test)


def _train(
    images: Images, backbone: Backbone, head: nn.Linear, train: Split,
    settings: FineTuning, seed: int,
) -> None:  # fmt: skip
    groups = [(backbone, settings.lr), (head, settings.head_lr)]
    rates = [rate for _, rate in groups]
    optimizer = torch.optim.SGD(
        [{"params": list(part.parameters()), "lr": rate} for part, rate in groups],
        momentum=0.9, nesterov=True, weight_decay=settings.weight_decay,
    )  # fmt: skip
    steps = settings.steps(len(train.labels))
    backbone.requires_grad_(True).train()
    rows = list(_batches(len(train.labels), settings.batch, steps, seed))
    for step, (x, own) in enumerate(_loaded(images, 0, train, rows, seed)):
        torch.manual_seed(derive(seed, "step", step))  # dropout
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        logits = head(backbone.activation(backbone(x)))
        wanted = torch.from_numpy(train.labels[own]).to(x.device)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(logits, wanted))
        optimizer.step()


@torch.inference_mode()
def _right(
    images: Images, backbone: Backbone, head: nn.Linear, test: Split
) -> Bool[np.ndarray, " m"]:
    backbone.eval()
    rows = np.array_split(np.arange(len(test.labels)), -(-len(test.labels) // 256))
    answers = [
        head(backbone.activation(backbone(x))).argmax(1).cpu().numpy()
        for x, _ in _loaded(images, 1, test, rows, None)
    ]
    return np.asarray(np.concatenate(answers) == test.labels)


def _batches(n: int, batch: int, steps: int, seed: int) -> Iterator[Int64[np.ndarray, " b"]]:
    """Yield the rows of each step: passes over all rows, each in another order."""
    size, epoch, order = min(batch, n), 0, np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:  # what is left of a pass is dropped
            order = generator(seed, "order", epoch).permutation(n)
            epoch += 1
        yield order[:size]
        order = order[size:]


def _loaded(
    images: Images, split: int, part: Split, rows: list[Int64[np.ndarray, " b"]], seed: int | None
) -> Iterator[tuple[Tensor, Int64[np.ndarray, " b"]]]:
    """Yield normalised crops of rows, random ones with a seed, and the rows."""
    data, index = images.data, images.indexes[split]
    view = CentreCrop(data.size, data.short_side)
    drawn = RandomResizedCrop(data.size, data.crop_scale, data.crop_ratio, data.flip)
    crops = (Crop(view if seed is None else drawn),)
    first = np.cumsum([0, *map(len, rows)])
    requests = (
        Request(part.sample_ids[own], at + np.arange(len(own)), derive(seed or 0, "crop"), crops)
        for own, at in zip(rows, first, strict=False)
    )
    device = next(images.backbone.parameters()).device
    loader = Loader(
        index, data.readers(), max_pixels=data.max_pixels, decode=data.decode, device=device
    )
    try:
        for own, loaded in zip(rows, loader.stream(requests), strict=True):
            x = to_float(loaded.images[0].to(device), data.mean, data.std)
            yield x.contiguous(memory_format=torch.channels_last), own
    finally:
        loader.close()


def parse_settings(text: str) -> FineTuning:
    """Return the settings of "epochs=5,lr=0.01", defaults where it names none.

    Raises `RecipeError` for a name that there is not, or a number that is none.
    """
    defaults = {field.name: getattr(FineTuning(), field.name) for field in fields(FineTuning)}
    given: dict[str, int | float] = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        name, _, value = pair.partition("=")
        try:
            given[name] = type(defaults[name])(value)
        except (KeyError, ValueError):
            shown = ", ".join(f"{name}={default}" for name, default in defaults.items())
            raise RecipeError(f"--finetune {pair}: give numbers for some of {shown}") from None
    for key, number in given.items():
        least = 0 if key == "weight_decay" else math.ulp(0)
        if not least <= number < math.inf:  # false for NaN
            raise RecipeError(f"--finetune {key}={number}: give a positive number")
    return replace(FineTuning(), **given)  # type: ignore[arg-type]

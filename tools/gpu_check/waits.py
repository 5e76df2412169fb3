"""The check of waits: how often the host waits for the GPU in what a run does again and again.

A step goes from page-locked crops to the optimizers, a batch of an extraction to rows on the host,
and a pass is one of k-means. `tests/waits.json` has the waits of each on the pretended device, in
whole runs. A GPU may be waited for as often, and no more.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from agreement import white_rows
from outcome import Outcome, Setting, judged

from deepclust import Recipe, kmeans
from deepclust.clustering.array_points import ArrayPoints
from deepclust.data.images.device_crops import on_device
from deepclust.data.read.loader import Loaded
from deepclust.methods import METHODS
from deepclust.methods.base import Method, Now
from deepclust.methods.embed import Embedder
from deepclust.optim.optimizers import Optimizers
from deepclust.seeds.table import SeedTable
from deepclust.stages import extract, mixing
from deepclust.stages.batches import Feed
from deepclust.stages.build import parameter_groups
from deepclust.stages.train import drop_gradients, forward_backward
from deepclust.world import World
from tests.methods import cases

TABLE = Path(__file__).resolve().parents[2] / "tests" / "waits.json"
WAITS = "called a synchronizing CUDA operation"  # torch's words
ITERATIONS = 20  # of the k-means
Work = Callable[[], int]  # returns how many steps, batches or passes it was
NO_INDEX: Any = None


def waits(setting: Setting, names: tuple[str, ...] = tuple(METHODS)) -> Outcome:
    """Compare the waits in a step, a batch and a pass of every method with the table."""
    table = json.loads(TABLE.read_text())
    more = {}
    for name in names:
        for part, work in parts_of(name, setting.device).items():
            for _ in range(2):  # what is made once may wait
                work()
            with counted(setting.device) as seen:
                units = work()
            if math.ceil(len(seen) / units) > table.get(name, {}).get(part, 0):
                more[f"{part} of {name}"] = seen[:5]
    text = f"{len(names)} methods wait as often as on the pretended device, or less"
    if more:
        text = f"waits more often than on the pretended device: {', '.join(more)}"
    return judged(not more, text, more=more)


def parts_of(name: str, device: torch.device) -> dict[str, Work]:
    """What a run of a method does again and again, by the table's names."""
    recipe, world = cases.recipe(name), World(device=device)
    method = cases.method(recipe, world).to(device).train()
    parts = {"step": step_of(recipe, method, world)}
    if (refresh := recipe.method.round) is not None:
        parts["batch of extraction"] = batch_of(recipe, method, world)
        if refresh.kind == "k-means":
            parts["pass of k-means"] = passes_on(device)
    return parts


def step_of(recipe: Recipe, method: Method, world: World) -> Work:
    """A step as training takes it, with labels where the recipe has seeds."""
    feed = Feed(recipe, NO_INDEX, "offset", world, seeds_of(recipe))
    optimizers = Optimizers(parameter_groups(method), recipe.train, method.owned(), world)
    heads = recipe.method.round.heads if recipe.method.round else 0
    loaded = loaded_of(recipe, world.device)
    trainer: Any = SimpleNamespace(recipe=recipe, world=world, model=method)
    pseudo_labels = np.tile(np.arange(cases.SAMPLES) % cases.K, (heads, 1))
    targets: Any = SimpleNamespace(assignments=pseudo_labels)

    def step() -> int:
        batch = feed.to_batch(loaded, targets, 0, Now())
        optimizers.set_schedule(Now())
        method.before_step(batch)
        forward_backward(trainer, batch, last=True)
        drop_gradients(method, method.frozen(Now()))
        optimizers.step()
        method.after_step(Now())
        return 1

    return step


def seeds_of(recipe: Recipe) -> SeedTable | None:
    """Labels of every other sample, if the recipe wants some."""
    if recipe.seeds is None:
        return None
    samples = np.arange(0, cases.SAMPLES, 2)
    classes = (samples // 2 % cases.CLASSES).astype(np.int32)
    return SeedTable(samples, classes, list(cases.NAMES_OF))


def loaded_of(recipe: Recipe, device: torch.device) -> Loaded:
    """The crops of all samples, as the loader hands them over."""
    kinds = recipe.method.crops(recipe.data)
    sizes = [kind.size for kind in kinds for _ in range(kind.count)]
    ids = np.arange(cases.SAMPLES)
    mixed = recipe.seeds is not None and recipe.seeds.mix is not None
    partners = mixing.partners(ids % 2 == 0) if mixed else None
    loaded = Loaded(tuple(map(pixels, sizes)), ids, ids, partners=partners)
    return loaded if device.type == "cpu" else loaded.pin_memory()


def pixels(size: int) -> torch.Tensor:
    """Random images."""
    return torch.randint(0, 256, (cases.SAMPLES, 3, size, size), dtype=torch.uint8)


def batch_of(recipe: Recipe, method: Method, world: World) -> Work:
    """A batch of an extraction, until its rows are on the host and in the moments."""
    embedder = Embedder(method, recipe.data, recipe.train.precision, world.device)
    ids, refresh = np.arange(cases.SAMPLES), recipe.method.round
    loaded = Loaded((pixels(recipe.data.size),), ids, ids)
    loaded = loaded if world.device.type == "cpu" else loaded.pin_memory()
    context: Any = SimpleNamespace(dtype=torch.float16, moments=refresh and refresh.whiten)
    (images,) = loaded.images
    pivot = embedder.clustered(on_device(images, world.device)).mean(0)

    def batch() -> int:
        rows = embedder.clustered(on_device(images, world.device)).float()
        extract._add_batch(context, extract._Open(), rows, loaded, pivot)
        return 1

    return batch


def passes_on(device: torch.device) -> Work:
    """A k-means of rows that lie on the device."""
    rows = white_rows(4000, 64).half().to(device)

    def passes() -> int:
        kmeans(ArrayPoints(rows, device=device), 100, iterations=ITERATIONS)
        return ITERATIONS + 1

    return passes


@contextmanager
def counted(device: torch.device) -> Iterator[list[str]]:
    """List the places where the host waits for the GPU in the block, once it is over."""
    seen: list[str] = []
    if device.type != "cuda":
        yield seen
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places = ((one.filename, one.lineno) for one in caught if WAITS in str(one.message))
    seen += [f"{Path(file).name}:{line}" for file, line in places]

"""The clusters of a method that has no rounds: what its network answers for every image of the run.

SwAV, DINO and DAC learn clusters by gradient, and nothing on disk says which image is in which. So
the newest checkpoint is asked, image by image at the centre crop, as in extraction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from cluster_jobs.results.evaluate import load_embedder
from cluster_jobs.results.shards import open_own
from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.find import described, is_remote
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, RecipeError, RunDiffersError
from deepclust.files import read_record
from deepclust.run.directory import Run
from deepclust.trained.trained_run import answered_classes


@dataclass(frozen=True)
class Answers:
    """Each sample's cluster, -1 and a reason where its image cannot be read."""

    clusters: Int32[np.ndarray, " n"]
    reasons: dict[int, str]
    classes: np.ndarray | None  # the class name of each cluster [k + 1], None for free ones


@contextlib.contextmanager
def open_trained(run: Run, *, remote: bool) -> Iterator[Index]:
    """Yield the index of the shards that a run was trained on, whose images are to be read.

    Raises `RunDiffersError` if other shards are in their place, and `RecipeError` for shards behind
    a URL that nobody has allowed to be read (`remote`).
    """
    shards = run.recipe.data.shards
    if is_remote(shards) and not remote:
        raise RecipeError(
            f"{described(shards)} are behind URLs, and {run.path} has no clusters without their "
            "images. If you trust the run's recipe, say so: --remote"
        )
    with open_own(run, remote=remote) as index:
        trained = read_record(run.path / "data.json", {"fingerprint": str})["fingerprint"]
        if index.fingerprint != trained:
            raise RunDiffersError(
                f"{described(shards)} now has fingerprint {index.fingerprint}, but {run.path} was "
                f"trained on {trained}. Put the shards of the run back in that folder."
            )
        yield index


def ask(run: Run, index: Index, emit: Callable[[str], None]) -> Answers:
    """Return the argmax of what a run's newest network answers for every image.

    `emit` is given what is odd about the checkpoint. Raises `DataError` where no image can be read.
    """
    embedder, data = load_embedder(run, emit), run.recipe.data
    clusters = np.full(len(index), -1, np.int32)
    reasons = dict(index.excluded)
    loader = Loader(
        index,
        data.readers(),
        max_pixels=data.max_pixels,
        decode=data.decode,
        device=embedder.device,
    )
    try:
        for loaded in loader.stream(_requests(run, index)):
            logits = embedder.answered(loaded.images[0])
            clusters[loaded.sample_ids] = logits.argmax(1).cpu().numpy()
            for bad in loaded.bad:
                clusters[bad.sample_id], reasons[bad.sample_id] = -1, bad.reason
    finally:
        loader.close()
    if (clusters < 0).all():
        raise DataError(f"no image of {index.origin} can be read, so {run.path} has no clusters")
    return Answers(clusters, reasons, answered_classes(run, embedder.method))


def _requests(run: Run, index: Index) -> Iterator[Request]:
    """Yield requests for every sample that is not excluded, in order."""
    data = run.recipe.data
    crops = (Crop(CentreCrop(data.size, data.short_side)),)
    excluded = np.array(sorted(index.excluded), np.int64)
    for first in range(0, len(index), data.extract_batch):
        part = np.arange(first, min(first + data.extract_batch, len(index)))
        part = np.setdiff1d(part, excluded)
        if len(part):
            yield Request(part, positions=part, key=0, crops=crops)

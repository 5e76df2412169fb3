"""The images of some clusters: those nearest to the centroid, and a few random members.

The nearest ones show what a cluster means, the random ones what it holds. The clusters are those of
head 0. Images are read from the shards through the index, made small, and put into the page as data
URIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

from cluster_jobs.report.browser import Browser, browse, class_name
from cluster_jobs.report.seeds import Record, unlabelled
from cluster_jobs.results.assignments import open_clustered
from cluster_jobs.results.by_cluster import before_of, majorities
from cluster_jobs.results.pictures import Pictures, data_uri
from deepclust.data.images.decode import DecodeError
from deepclust.data.shards.find import is_remote
from deepclust.data.shards.index import Index
from deepclust.run.directory import Run
from deepclust.run.round_files import read_array, read_assignments
from deepclust.trained.trained_run import seeded_classes
from deepclust.world import generator

PER_GROUP = 4  # clusters of each kind: the largest, median, random
NEAREST, RANDOM = 10, 5  # images of each cluster
SIDE = 96  # pixels; 180 such images, 27 KB raw at the very worst, keep the page below 5 MB
EXACT = 48  # images not larger are kept as they are, as PNG


@dataclass(frozen=True)
class Thumbnail:
    """A small image. `odd`: its class is not its cluster's most frequent one."""

    source: str
    title: str
    odd: bool
    tiny: bool


@dataclass(frozen=True)
class Card:
    """A cluster. `majority` and `purity` are None without labels, `seed` in a free cluster."""

    cluster: int
    size: int
    majority: str | None
    purity: float | None
    seed: str | None  # the class whose prototype it has, or its super-cluster
    nearest: list[Thumbnail]
    random: list[Thumbnail]


@dataclass(frozen=True)
class Gallery:
    """The cards by kind of cluster, or in `note` why there are none."""

    groups: list[tuple[str, list[Card]]]
    note: str = ""
    browser: Browser | None = None
    failed: bool = False  # whether the note is an error
    unlabelled: Sequence[Record] = ()  # the classes without a label, of a seeded round

    @property
    def labelled(self) -> bool:
        """Whether any cluster has a majority class."""
        return any(card.majority is not None for _, cards in self.groups for card in cards)


def gallery(run: Run, *, remote: bool = False) -> Gallery:
    """Return the gallery of the last round.

    An error becomes its note. The run may be somebody else's: nothing is written, and URLs that its
    recipe names are read only if `remote` says so.
    """
    rounds = run.rounds()
    if rounds and not remote and is_remote(run.recipe.data.shards):
        return Gallery([], "The images are behind a URL: `deepclust report --remote` shows them.")
    if not rounds:
        return Gallery([], "The images of the clusters appear here after the first round.")
    try:
        with open_clustered(run, rounds[-1], only_read=True) as index:
            return _gallery(run, rounds[-1], index)
    except Exception as error:  # a report without images is better than none
        return Gallery([], f"The images cannot be shown: {error}", failed=True)


def _gallery(run: Run, number: int, index: Index) -> Gallery:
    assignments = read_assignments(run, number)[0]
    distances = read_array(run.round(number) / "assignments", "distances.npy", dims=2)[0]
    sizes = np.bincount(assignments[assignments >= 0])
    classes = seeded_classes(run, number)
    seeds = [None] * len(sizes) if classes is None else classes.tolist()
    most = run.recipe.data.max_pixels
    with Pictures(index, most) as pictures:

        def card(cluster: int) -> Card:
            return _card(pictures, index, cluster, seeds[cluster], assignments, distances)

        groups = [
            (title, [card(one) for one in some.tolist()])
            for title, some in choose(sizes, seed=number).items()
        ]
    browser = browse(index, assignments, distances, seeds, most, before_of(run, number))
    return Gallery(
        groups, browser=browser, unlabelled=unlabelled(index, assignments, seeds[: len(sizes)])
    )


def choose(sizes: Int64[np.ndarray, " k"], seed: int) -> dict[str, Int64[np.ndarray, " c"]]:
    """Return the clusters to show, by kind: all when they are few, and never empty ones."""
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    if len(order) <= 3 * PER_GROUP:
        return {"All clusters, by size": order}
    largest, rest = order[:PER_GROUP], order[PER_GROUP:]
    middle = max(0, len(order) // 2 - PER_GROUP - PER_GROUP // 2)
    median = rest[middle : middle + PER_GROUP]
    others = np.setdiff1d(rest, median)
    drawn = generator(seed, "report", "gallery").choice(others, PER_GROUP, replace=False)
    return {"The largest": largest, "Of median size": median, "At random": drawn}


def _card(
    pictures: Pictures,
    index: Index,
    cluster: int,
    seed: str | None,
    assignments: Int32[np.ndarray, " n"],
    distances: Float32[np.ndarray, " n"],
) -> Card:
    members = np.flatnonzero(assignments == cluster)
    by_distance = members[np.argsort(distances[members], kind="stable")]
    draw = generator(cluster, "report", "members")
    rest = draw.permutation(by_distance[NEAREST:])
    labels = None if index.labels is None else np.asarray(index.labels)[members]
    shares, most = majorities(labels, np.zeros(len(members), np.int32), 1)
    majority = int(most[0])
    return Card(
        cluster,
        len(members),
        class_name(index, majority),
        None if majority < 0 else float(shares[0]),
        seed,
        _thumbnails(pictures, index, by_distance[: 2 * NEAREST], NEAREST, majority),
        _thumbnails(pictures, index, rest[: 2 * RANDOM], RANDOM, majority),
    )


def _thumbnails(
    pictures: Pictures,
    index: Index,
    sample_ids: Int64[np.ndarray, " m"],
    count: int,
    majority: int,
) -> list[Thumbnail]:
    """Return the first `count` of the samples that can be decoded."""
    thumbnails: list[Thumbnail] = []
    for sample_id in sample_ids.tolist():
        if len(thumbnails) == count:
            break
        try:
            image = pictures.read(sample_id)
        except DecodeError:
            continue
        tiny = max(image.size) <= EXACT
        uri = data_uri(image, SIDE, 82, "PNG" if tiny else "JPEG")
        label = -1 if index.labels is None else int(index.labels[sample_id])
        kind = f" · {class_name(index, label)}" if label >= 0 else ""
        title = f"{index.keys[sample_id]}{kind} · sample {sample_id}"
        odd = majority >= 0 and label not in (-1, majority)
        thumbnails.append(Thumbnail(uri, title, odd, tiny))
    return thumbnails

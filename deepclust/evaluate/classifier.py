"""What the run itself answers: its classifier or its pinned clusters, judged on the test rows.

A column of its logits stands for a class of the seeds or for none (a free prototype or cluster). A
class's probability is the sum over its columns. Two answers are judged:

- the *closed* one is the likeliest labelled class, whatever the free columns say,
- the *open* one may be a free column, which means that the image is of no labelled class.

A class without a label can only be answered by a free column. As in the accuracy of clusterings,
each such class is matched with one free column, by the Hungarian method on the test rows.

Calibration is the expected calibration error of Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017, eq. 3, in 15 bins of equal width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy  # imports its parts when they are used
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from deepclust.errors import DataError
from deepclust.evaluate.frozen import Answers, Frozen, Skipped, Table, Value
from deepclust.evaluate.interval import with_interval

BINS = 15
TILE = 2**22  # logits held at a time
MOST_CLASSES = 200  # that a confusion matrix is written for
FREE = "no class"  # the column of the confusion matrix for answers that are free


@dataclass(frozen=True)
class Judged:
    """The answers to the test rows, as numbers.

    Labelled classes are 0 to c - 1. From c on `truth` counts the classes without a label, and
    `open` the free columns.
    """

    names: list[str]  # of the classes in `truth`
    labelled: int  # c
    truth: Int64[np.ndarray, " n"]
    closed: Int64[np.ndarray, " n"]
    open: Int64[np.ndarray, " n"]
    confidence: Float64[np.ndarray, " n"]  # of the closed answer
    surprise: Float64[np.ndarray, " n"]  # -log p of the truth, nats, NaN where it has no label

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """Which rows are of a labelled class."""
        return self.truth < self.labelled


def classifier(frozen: Frozen) -> Iterator[tuple[str, Value]]:
    """Yield scores of the closed answer and, where something is free or without a label, the open.

    "top1" and "recall" (the mean over the test rows' classes) are of the closed answer. A row
    of a class without a label counts as wrong. "ece" and "nll" (nats) are of the rows of labelled
    classes. "top1_open" and "recall_unlabelled" are of the open answer, and "free" is the share of
    answers that are free. The tables are "classes" (labels, test rows and recall of each),
    "calibration" by bins, and "confusion" of the open answers, of at most MOST_CLASSES classes.

    Raises `Skipped` without a classifier, `DataError` when no test row is of one of its classes.
    """
    if frozen.answers is None:
        raise Skipped(frozen.answers_missing)
    judged = _judge(frozen, frozen.answers)
    if not judged.known.any():
        raise DataError(
            f"no test row is of a class of the seeds ({', '.join(frozen.answers.classes[:5])}): "
            "name the classes of both alike"
        )
    matched = _match(judged)
    closed = judged.closed == judged.truth
    yield from with_interval("top1", closed, frozen.seed)
    yield from _scores(judged, matched, bool((frozen.answers.class_of < 0).any()))
    yield "classes", _by_class(judged, matched, frozen.answers.labels)
    yield "calibration", _calibration(judged)
    if len(judged.names) <= MOST_CLASSES:
        yield "confusion", _confusion(judged)


def _scores(
    judged: Judged, matched: Int64[np.ndarray, " n"], has_free: bool
) -> Iterator[tuple[str, float]]:
    closed = judged.closed == judged.truth
    yield "recall", float(_recalls(judged, closed).mean())
    known = judged.known
    bins = _bins(judged)
    yield "ece", float(sum(n * abs(right - sure) for _, n, sure, right in bins) / known.sum())
    yield "nll", float(judged.surprise[known].mean())
    if has_free or not known.all():
        recalls = _recalls(judged, matched == judged.truth)
        yield "top1_open", float((matched == judged.truth).mean())
        yield "free", float((judged.open >= judged.labelled).mean())
        if not known.all():
            yield "recall_unlabelled", float(recalls[_classes(judged) >= judged.labelled].mean())


def _judge(frozen: Frozen, answers: Answers) -> Judged:
    """Ask the classifier about all test rows, some at a time."""
    test, labelled = frozen.test, len(answers.classes)
    others = [name for name in frozen.classes if name not in set(answers.classes)]
    names = [*answers.classes, *others]
    number = {name: i for i, name in enumerate(names)}
    truth = np.array([number[name] for name in frozen.classes], np.int64)[test.labels]
    tile = max(1, TILE // max(1, len(answers.class_of)))
    parts = []
    for start in range(0, len(truth), tile):
        logits = answers.classify(test.features[start : start + tile]).double().cpu()
        parts.append(_answer(logits, torch.from_numpy(answers.class_of), labelled))
    joint, closed = (torch.cat(part) for part in zip(*parts, strict=True))
    confidence, answer = closed.max(1)
    surprise = np.full(len(truth), np.nan)
    known = np.flatnonzero(truth < labelled)
    own = closed[torch.from_numpy(known), torch.from_numpy(truth[known])]
    surprise[known] = -own.clamp(min=1e-300).log().numpy()
    return Judged(
        names, labelled, truth, answer.numpy(), joint.numpy(), confidence.numpy(), surprise
    )


def _answer(
    logits: Float[Tensor, "b k"], class_of: Int64[Tensor, " k"], labelled: int
) -> tuple[Int64[Tensor, " b"], Float[Tensor, "b c"]]:
    """Return the open answer, and the probabilities of the classes without the free columns."""
    pinned, free = (class_of >= 0).nonzero()[:, 0], (class_of < 0).nonzero()[:, 0]
    empty = logits.new_zeros(len(logits), labelled)
    every = logits.softmax(1)
    joint = empty.index_add(1, class_of[pinned], every[:, pinned])
    answer = torch.cat([joint, every[:, free]], 1).argmax(1)
    return answer, empty.index_add(1, class_of[pinned], logits[:, pinned].softmax(1))


def _match(judged: Judged) -> Int64[np.ndarray, " n"]:
    """Return the open answers, a free column being the class without a label that it matches.

    A free column that matches none is -1.
    """
    free, unlabelled = judged.open >= judged.labelled, ~judged.known
    matched = np.where(free, -1, judged.open)
    classes, rows = np.unique(judged.truth[unlabelled & free], return_inverse=True)
    columns, places = np.unique(judged.open[unlabelled & free], return_inverse=True)
    counts = np.zeros((len(classes), len(columns)), np.int64)
    np.add.at(counts, (rows, places), 1)
    for one, column in zip(
        *scipy.optimize.linear_sum_assignment(counts, maximize=True), strict=True
    ):
        matched[judged.open == columns[column]] = classes[one]
    return matched


def _classes(judged: Judged) -> Int64[np.ndarray, " t"]:
    """Return the classes that have a test row, in order."""
    return np.unique(judged.truth)


def _recalls(judged: Judged, right: Bool[np.ndarray, " n"]) -> Float64[np.ndarray, " t"]:
    """Return the recall of every class that has a test row, in order."""
    _, places, counts = np.unique(judged.truth, return_inverse=True, return_counts=True)
    recalls: Float64[np.ndarray, " t"] = np.bincount(places, weights=right) / counts
    return recalls


def _by_class(
    judged: Judged, matched: Int64[np.ndarray, " n"], labels: tuple[int, ...] | None
) -> Table:
    """Return labels, test rows and recall by class: of a class without a label, the matched one."""
    classes, counts = np.unique(judged.truth, return_counts=True)
    right = np.where(judged.known, judged.closed, matched) == judged.truth
    values: list[list[float | None]] = []
    for one, count, recall in zip(classes, counts, _recalls(judged, right), strict=True):
        own = 0 if one >= judged.labelled else None if labels is None else labels[one]
        values.append([own, int(count), float(recall)])
    return Table(
        rows=[judged.names[i] for i in classes], columns=["labels", "images", "recall"],
        values=values,
    )  # fmt: skip


def _bins(judged: Judged) -> list[tuple[int, int, float, float]]:
    """Return number, rows, mean confidence and accuracy of the bins that have a row."""
    known = judged.known
    confidence, right = judged.confidence[known], (judged.closed == judged.truth)[known]
    number = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(np.int64)
    return [
        (int(b), int((own := number == b).sum()), float(confidence[own].mean()), right[own].mean())
        for b in np.unique(number)
    ]


def _calibration(judged: Judged) -> Table:
    """Return the reliability diagram: the rows that are so confident, and how many are right."""
    bins = _bins(judged)
    return Table(
        rows=[f"{b / BINS:.2f} to {(b + 1) / BINS:.2f}" for b, *_ in bins],
        columns=["images", "confidence", "accuracy"],
        values=[[rows, sure, float(right)] for _, rows, sure, right in bins],
    )


def _confusion(judged: Judged) -> Table:
    """Return the test rows of each class by the open answer: a labelled class, or none."""
    classes, rows = np.unique(judged.truth, return_inverse=True)
    answers = np.minimum(judged.open, judged.labelled)
    counts = np.zeros((len(classes), judged.labelled + 1), np.int64)
    np.add.at(counts, (rows, answers), 1)
    columns = [*judged.names[: judged.labelled], FREE]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    return Table(
        rows=[judged.names[i] for i in classes],
        columns=columns,
        values=[[*row] for row in counts.tolist()],
    )

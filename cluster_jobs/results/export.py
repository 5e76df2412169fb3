"""The export of a run: its backbone, and on request what tells the clusters of new images.

With `classifier` the weights are those that `deepclust predict` uses: of the last round. Without,
they are those of the newest checkpoint. Of a finished run both are the same. With `best` they are
those of the best checkpoint (`train.evaluate`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster_jobs.results import model_card
from cluster_jobs.results.evaluate import chosen_checkpoint
from deepclust.errors import RecipeError
from deepclust.export import elsewhere
from deepclust.export.backbone import Exported, Head, export_backbone, usage_of, weights_hash
from deepclust.export.program import PROGRAMS
from deepclust.files import atomic_file, file_hash, target_of, write_text
from deepclust.methods.base import Method
from deepclust.methods.embed import Embedder
from deepclust.run.directory import Run, open_run
from deepclust.stages.warm_start import export_meta
from deepclust.trained import export_clusters
from deepclust.trained.answers import Columns
from deepclust.trained.class_means import answering
from deepclust.trained.classifier import head_of
from deepclust.trained.cluster_head import ClusterHead, cluster_head_of, images_to_clusters
from deepclust.trained.labelling import Answers
from deepclust.trained.saved import embedder_of
from deepclust.trained.trained_run import Labeller, best_labeller_of, labeller_of

log = logging.getLogger("deepclust")
Tell = Callable[[str], None]
SUFFIXES = {  # others hold safetensors
    ".pth": "torchvision", ".pt": "torchvision", ".onnx": "onnx", ".pt2": "torch-export",
}  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """What is exported, and where to: `out` as the user wrote it, `file` without links."""

    run: Run
    out: Path
    file: Path
    format: str


@dataclass(frozen=True)
class _Given:
    """What is written: a network at a step, and what travels with it.

    `program` is the rule where the file goes from images to clusters. `part` is the rule where it
    lies beside the weights. `head` is a classifier of logits.
    """

    method: Method
    step: int
    head: Head | None = None
    program: ClusterHead | None = None
    part: Head | None = None

    @property
    def names(self) -> list[str] | None:
        """The names of the clusters, None for a backbone alone."""
        if self.program is not None:
            return self.program.names
        return None if self.part is None else list(self.part.about["names"])


def export_run(
    run_dir: Path,
    out: Path,
    format_: str | None = None,
    emit: Tell = log.warning,
    *,
    best: bool = False,
    classifier: bool = False,
    card: Path | None = None,
) -> Exported:
    """Export the backbone of a run, in a format (default: that of the suffix).

    In safetensors the classifier of its seeds is beside it: its own, where it answers classes, else
    class means (`trained/class_means.py`). With `classifier` the file tells clusters too
    (`trained/export_clusters.py`). `card` is a file for the model card, which a folder has as its
    README.md anyway.

    `emit` is given what to know about it, such as that a newer checkpoint cannot be read. Raises
    `RecipeError` for a run without clusters, and for a format that cannot hold it.
    """
    format_ = format_ or SUFFIXES.get(Path(out).suffix, "safetensors")
    asked = _Asked(open_run(run_dir), Path(out), target_of(out), format_)
    given = (_with_clusters if classifier else _weights_alone)(asked, emit, best)
    text = _card_of(asked, given)
    exported = _program(asked, given) if given.program else _weights(asked, given, text)
    if card is not None:
        write_text(target_of(card), text)
    return replace(exported, path=out, usage=_usage(given, asked.out, asked.format))


def _weights_alone(asked: _Asked, emit: Tell, best: bool) -> _Given:
    """Return a checkpoint's weights, with the classifier of the seeds where a file can hold it."""
    saved = chosen_checkpoint(asked.run, emit, best)
    embedder, step = embedder_of(asked.run, saved), saved.state.step
    return _Given(embedder.method, step, _seeded_head(asked, embedder, step, emit))


def _with_clusters(asked: _Asked, emit: Tell, best: bool) -> _Given:
    """Return the weights of the last round, or the best ones, with what tells their clusters."""
    labeller = best_labeller_of(asked.run, emit) if best else labeller_of(asked.run, None, emit)
    method, step, rule = labeller.embedder.method, labeller.step, cluster_head_of(labeller)
    if asked.format in PROGRAMS:
        return _Given(method, step, program=rule)
    if isinstance(labeller.rule, Answers) and asked.format == "safetensors":
        return _Given(method, step, head=_answering_head(asked, labeller))
    part = export_clusters.part_of_head(rule, asked.run.recipe.method.name)
    head = _seeded_head(asked, labeller.embedder, step, emit)
    return _Given(method, step, head=head, part=part)


def _seeded_head(asked: _Asked, embedder: Embedder, step: int, emit: Tell) -> Head | None:
    """Return the classifier of a run's seeds, for a file that can hold it."""
    run = asked.run
    if run.recipe.seeds is None or asked.format != "safetensors":
        return None
    named = answering(run, embedder, step, emit)
    head = named if isinstance(named, str) else head_of(run, run.recipe, named.method)
    if isinstance(head, Head):
        return head
    emit(f"note: the file has no classifier: {head}")
    return None


def _answering_head(asked: _Asked, labeller: Labeller) -> Head:
    """Return the parts of a method that answer clusters, named by classes where it has them."""
    run, method = asked.run, labeller.embedder.method
    head = head_of(run, run.recipe, method)
    if isinstance(head, str):  # without seeds: its clusters have numbers
        unnamed = np.full(labeller.rule.k, -1)
        head = head_of(run, run.recipe, method, Columns((), unnamed, None))
    if isinstance(head, str):
        raise RecipeError(f"--classifier: {head}. Use --format onnx or torch-export")
    return head


def _weights(asked: _Asked, given: _Given, card: str) -> Exported:
    """Write the backbone, and the rule and the card where its file or folder can hold them."""
    beside = {model_card.NAME: card.encode()}
    content = None if given.part is None else export_clusters.content_beside(given.part)
    if content is not None:
        beside[export_clusters.BESIDE] = content
    exported = export_backbone(
        given.method.trunk, asked.file, asked.format, meta=export_meta(asked.run), head=given.head,
        clusters=given.part, beside=beside,
    )  # fmt: skip
    if content is not None and asked.format not in ("hf", "safetensors"):
        with atomic_file(export_clusters.place_beside(asked.file)) as partial:
            partial.write_bytes(content)
    return exported


def _program(asked: _Asked, given: _Given) -> Exported:
    """Write images to clusters as one file."""
    assert given.program is not None
    trunk = given.method.trunk
    elsewhere.check(trunk, asked.format)
    module = images_to_clusters(given.method, given.program)
    export_clusters.write_program(module, asked.file, asked.format, export_meta(asked.run))
    weights = weights_hash(trunk.export_state())
    return Exported(asked.file, asked.format, file_hash(asked.file), weights, "")


def _card_of(asked: _Asked, given: _Given) -> str:
    usage = _usage(given, Path(asked.out.name), asked.format)
    return model_card.model_card(
        model_card.Card(asked.run, given.method.trunk, given.step, asked.format, usage, given.names)
    )


def _usage(given: _Given, path: Path, format: str) -> str:
    """Return the lines that load what was written, at a path."""
    if given.program is not None:
        return export_clusters.usage_of(path, format)
    usage = usage_of(given.method.trunk, path, format, given.head)
    if given.part is None:
        return usage
    place = path if format == "safetensors" else export_clusters.place_beside(path)
    place = path / export_clusters.BESIDE if format == "hf" else place
    return f"{usage}\n{export_clusters.beside_usage(place)}"

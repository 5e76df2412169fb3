"""The classifier that travels with an exported backbone, and class names for images from it.

A file of `deepclust export --format safetensors` has the backbone's weights, and those of the parts
that make a method's logits of features, under PREFIX. The header says the names of the columns and
the method's section, from which the same parts are built again. So any method that answers classes
can be exported, with its projection or without. Class means (`nearest_mean.py`) are exported for
all other runs that have labels. Old files have no classifier, and `load_backbone` reads both.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.errors import DataError, DeepclustError
from deepclust.export.backbone import CLASSIFIER, Head, read_export, weights_hash
from deepclust.methods import METHODS
from deepclust.methods.base import Method, Setting
from deepclust.models import Backbone
from deepclust.recipe import Recipe
from deepclust.recipe.named import part_of, section_of
from deepclust.recipe.sections import ClusterSection, MethodSection
from deepclust.run.directory import Run
from deepclust.trained.answers import Columns, columns_of, parts_of, try_answer
from deepclust.trained.nearest_mean import SECTION, NearestMean
from deepclust.world import ALONE

LARGEST = 2**20  # columns of a classifier, or clusters


class Classifier(nn.Module):
    """A backbone with the classifier of its run: normalised images [b, 3, h, w] to logits [b, k].

    `id2label` has the name of every column, as in Hugging Face's configurations: a class of the
    seeds, or "cluster J" for a free one. `classes` are the names that are classes. `meta` is the
    header, where `mean` and `std` say how images were normalised.
    """

    def __init__(
        self, backbone: Backbone, method: Method, names: list[str], classes: list[str]
    ) -> None:
        super().__init__()
        self.backbone, self.method = backbone, method
        self.id2label = dict(enumerate(names))
        self.label2id = {name: i for i, name in self.id2label.items()}
        self.classes, self.meta = classes, backbone.meta

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """Return logits of normalised float images."""
        return self.method.answer(self.backbone(images)).float()

    @torch.no_grad()
    def classify(self, images: Float[Tensor, "b 3 h w"]) -> list[str]:
        """Return the name of the likeliest column for every image."""
        return [self.id2label[i] for i in self(images).argmax(1).tolist()]


def head_of(run: Run, recipe: Recipe, method: Method, columns: Columns | None = None) -> Head | str:
    """Return what an export of a run's backbone has beside it, or why it can have nothing.

    `columns` are those of its logits, by default the classes of its seeds.

    The parts are those of `answers.parts_of`. They are built again here as `load_classifier` does,
    and must give the same logits, which rules out methods with a parameter outside a module.
    """
    known = columns_of(run, recipe, method) if columns is None else columns
    if isinstance(known, str):
        return known
    parts = tuple(f"{part}." for part in parts_of(method))
    section = SECTION if isinstance(method, NearestMean) else recipe.method
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in method.state_dict().items()
        if name.startswith(parts)
    }
    about = {
        "method": section.model_dump(mode="json"),
        "cluster": None if recipe.cluster is None else [recipe.cluster.k, recipe.cluster.dim],
        "names": known.names,
        "classes": list(known.classes),
        "weights": weights_hash(tensors),
    }
    try:
        again = _build(about, tensors, copy.deepcopy(method.trunk).cpu())
    except Exception as error:  # the end of a run must not fail by it
        return f"{section.name} cannot be built from a file: {error}"
    if not torch.allclose(try_answer(again), try_answer(method).cpu(), rtol=1e-2, atol=1e-2):
        return f"{section.name} answers by parameters that are in no module"
    return Head(about, tensors, lambda path: _check_same(path, again))


def _check_same(path: Path, method: Method) -> None:
    """Raise `DataError` unless the file's classifier gives equal logits, bit for bit."""
    if not torch.equal(try_answer(load_classifier(path).method), try_answer(method)):
        raise DataError(
            "the classifier, read back, gives other logits; nothing was written. Check the disk, "
            "then export again."
        )


def load_classifier(path: str | Path) -> Classifier:
    """Return the backbone of an export with its classifier, on the CPU, in eval mode.

    `net(images)` are logits, and `net.id2label[i]` is the name of column i. Nothing in the file is
    executed: a method of somebody else must be imported first.

    Raises `DataError` for a file that is broken, or that has no classifier.
    """
    backbone, tensors = read_export(path)
    about = backbone.meta.get(CLASSIFIER)
    if about is None:
        raise DataError(
            f"{path} has no classifier. Export a run that has labelled seeds, or use load_backbone "
            "for its features."
        )
    try:
        method = _build(about, tensors, backbone)
        names, classes = ([str(name) for name in about[key]] for key in ("names", "classes"))
    except Exception as error:  # a forged header names any method, of any size
        why = str(error) if isinstance(error, DeepclustError) else repr(error)
        raise DataError(f"{path}: its classifier cannot be built: {why[:500]}") from error
    return Classifier(backbone, method, names, classes).eval()


def _build(about: dict[str, Any], tensors: dict[str, Tensor], backbone: Backbone) -> Method:
    """Return the method of a header around a backbone, with the tensors that are its classifier."""
    if weights_hash(tensors) != about["weights"]:
        raise DataError("the weights are not those that were exported. Export it again.")
    method = _without_weights(about, backbone)
    unknown = method.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown or try_answer(method).shape[1] != len(about["names"]):
        raise DataError(f"its method has no {unknown[:3]}, or not {len(about['names'])} columns")
    return method.requires_grad_(False).eval()


def _without_weights(about: dict[str, Any], backbone: Backbone) -> Method:
    """Return the method of a header around a backbone, as it is built."""
    name, classes = str(about["method"]["name"]), tuple(map(str, about["classes"]))
    cluster = None
    if about["cluster"] is not None:
        k, dim = about["cluster"]
        cluster = ClusterSection(k=k, dim=dim)
    if max(len(about["names"]), len(classes), cluster.k if cluster else 1) > LARGEST:
        raise DataError("it has too many columns")
    if name == SECTION.name:
        return NearestMean.empty(backbone, classes)
    if name not in METHODS and name not in sys.modules:
        raise DataError(f"import {name} first: a module is not imported because a file names it")
    config = section_of(name, METHODS, MethodSection).model_validate(about["method"])
    setting = Setting(config, cluster, 0, ALONE, classes=classes)
    method: Method = part_of(name, METHODS, "method")(backbone, setting)
    return method

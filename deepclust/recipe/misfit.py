"""What is wrong between two sections of a recipe, each of which is right in itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepclust.recipe.recipe import Recipe
    from deepclust.recipe.sections import SeedsSection


def misfit(recipe: Recipe) -> str | None:
    """Return the first thing that does not fit together, None if all does."""
    method, cluster = recipe.method, recipe.cluster
    if method.round is None and (unused := _unused(recipe)):
        return f"{method.name} does not cluster: leave {unused} out (null)"
    if method.round is not None and cluster is None:
        return f"cluster: is required by method {method.name}"
    if method.whole_batch and recipe.train.accumulate > 1:
        parts = "set train.accumulate=1, or more train.ranks"
        return f"{method.name} contrasts whole batches: {parts}"
    return (
        _misfit_of_batch(recipe)
        or method.misfit(recipe)
        or _misfit_of_round(recipe)
        or _misfit_of_crops(recipe)
        or _misfit_of_seeds(recipe)
        or _misfit_of_terms(recipe)
    )  # fmt: skip


def _unused(recipe: Recipe) -> str | None:
    """Return the first key that is there and means nothing without a clustering."""
    if recipe.cluster is not None:
        return "cluster"
    return "init.assignments" if recipe.init.assignments else None


def _misfit_of_round(recipe: Recipe) -> str | None:
    """Return a key of the clustering that means nothing for the method's kind of rounds."""
    refresh, cluster = recipe.method.round, recipe.cluster
    if refresh is None or cluster is None:
        return None
    unused = [] if refresh.whiten else ["dim", "supers"]
    if refresh.kind == "sinkhorn":
        unused += ["init", "iterations", "empty", "min_size", "backend"]
    for key in unused:
        value, default = getattr(cluster, key), type(cluster).model_fields[key].default
        if value != default:
            how = "balances its heads' answers" if refresh.kind == "sinkhorn" else "whitens nothing"
            return (
                f"cluster.{key}={value} means nothing for {recipe.method.name}, which {how}: "
                "leave it out"
            )
    return None


def _misfit_of_batch(recipe: Recipe) -> str | None:
    method, train = recipe.method, recipe.train
    if recipe.data.decode == "gpu" and train.device == "cpu":
        return "data.decode: gpu needs the backbone on a GPU: leave train.device=auto, or set cpu"
    if method.whole_batch and train.batch < 2:
        return f"train.batch: {method.name} compares the images of a batch: set 2 or more"
    parts = train.ranks * train.accumulate
    if train.batch < method.least * parts:
        return (
            f"train.batch: {method.name} norms each crop alone, so {parts} parts need "
            f"{method.least} images each: set {method.least * parts} or more"
        )
    return None


def _misfit_of_crops(recipe: Recipe) -> str | None:
    data = recipe.data
    kinds = recipe.method.crops(data)
    if data.local is not None and data.local.size >= data.size:
        return f"data.local.size: {data.local.size} is not smaller than data.size={data.size}"
    full = sum(kind.count for kind in kinds if kind.size == data.size)
    for key in ("blur", "solarise"):
        chance = getattr(data, key)
        if isinstance(chance, tuple) and len(chance) != full:
            return f"data.{key}: {len(chance)} values for {full} full-size crops of every image"
    if data.local is not None and full == sum(kind.count for kind in kinds):
        return f"data.local: {recipe.method.name} has no local crops: leave it out (null)"
    return None


def _misfit_of_seeds(recipe: Recipe) -> str | None:
    if recipe.seeds is None:
        users = [f"terms.{name}" for name, term in recipe.terms.items() if term.uses_labels]
        if recipe.method.labels == "required":
            users.insert(0, f"method {recipe.method.name}")
        return f"seeds: are required by {users[0]}: set seeds.labels" if users else None
    if problem := _misfit_of_labelled_rows(recipe, recipe.seeds):
        return problem
    if recipe.seeds_judge and recipe.seeds.share:
        why = f"{recipe.method.name} trains on no labels, which are for evaluation alone"
        return f"seeds.share: {why}: leave it out"
    if (recipe.cluster is None or recipe.seeds_judge) and (key := _idle_seeds(recipe.seeds)):
        why = f"means nothing for {recipe.method.name}, which pins no clusters"
        return f"seeds.{key} {why}: leave it out"
    if recipe.cluster is not None and recipe.seeds.share == 1:
        return "seeds.share: batches of labelled samples alone leave nothing to cluster"
    if recipe.cluster is not None and recipe.cluster.init == "two-level":
        return "seeds: a pinned clustering starts at random or by k-means++, not two-level"
    return None


def _misfit_of_labelled_rows(recipe: Recipe, seeds: SeedsSection) -> str | None:
    """Return a key on the labelled images of a batch that means nothing for this method."""
    name = recipe.method.name
    if seeds.mix is not None and not recipe.method.mixes:
        return (
            f"seeds.mix: {name} takes no mixture of two classes as a target: leave it out (null), "
            "or choose a method whose targets are the classes of the labels"
        )
    if seeds.lighter and not (recipe.uses_labels or seeds.share):
        key = "colour" if seeds.crop_scale is None else "crop_scale"
        return (
            f"seeds.{key}: no batch of {name} knows which images are labelled: set seeds.share, or "
            "leave it out"
        )
    return None


def _idle_seeds(seeds: SeedsSection) -> str | None:
    """Return the first key that is set and is for pinned clusters only.

    `seeds.refine` is not among them, since the evaluation of prototypes uses it too.
    """
    for key in ("prototypes", "momentum", "pin_from", "release_after", "force"):
        if getattr(seeds, key) != type(seeds).model_fields[key].default:
            return key
    return None


def _misfit_of_terms(recipe: Recipe) -> str | None:
    if recipe.method.answers != "nothing":
        return None
    for name, term in recipe.terms.items():
        if term.works_on == "logits":
            return (
                f"terms.{name} works on the answers of a classifier, and {recipe.method.name} has "
                "none: leave the term out (null), or choose another method"
            )
    return None

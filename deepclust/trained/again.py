"""The export of a finished run, written again from its last checkpoint."""

from __future__ import annotations

from pathlib import Path

from deepclust.errors import DataError
from deepclust.export.backbone import Exported, Head, export_backbone
from deepclust.run import checkpoint, labels
from deepclust.run.directory import Run
from deepclust.stages.build import build_method
from deepclust.stages.warm_start import backbone_part, export_meta
from deepclust.trained import class_means
from deepclust.trained.answers import columns_of
from deepclust.trained.classifier import head_of
from deepclust.world import ALONE


def export_again(run: Run, file: Path) -> Exported:
    """Write the backbone of the last checkpoint as the end of the run did.

    Raises `DataError` when that checkpoint is missing or damaged: an older one is not taken for it.
    """
    steps = [e["step"] for e in run.events() if e["event"] == "checkpoint"]
    folder = run.path / "checkpoints" / f"{max(steps, default=0):08d}"
    saved = checkpoint.Checkpoint(folder, *checkpoint.load(folder, alive=run.alive))
    weights = checkpoint.counting_weights(run, saved)
    method = build_method(run.recipe, ALONE, new=False, classes=labels.class_names(run))
    trunk = method.trunk
    try:
        trunk.load_state_dict(backbone_part(weights, run.recipe.method.trunk))
    except (KeyError, RuntimeError) as error:
        text = f"{file} cannot be written again from step {saved.state.step}: {error}"
        raise DataError(text) from error
    if run.recipe.seeds is not None:
        checkpoint.put_weights(method, weights, folder, method.owned())
    means = None
    if isinstance(columns_of(run, run.recipe, method), str):
        means = class_means.kept(run, trunk, saved.state.step)
    head = head_of(run, run.recipe, means or method)
    own = head if isinstance(head, Head) else None
    return export_backbone(trunk, file, "safetensors", meta=export_meta(run), head=own)

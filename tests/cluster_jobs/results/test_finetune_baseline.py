"""Beside a fine-tuned network stands the same network, fine-tuned from random weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster_jobs.results import baselines, evaluate
from cluster_jobs.results.baselines import Beside
from deepclust import open_index
from deepclust.evaluate.finetune import finetune
from deepclust.evaluate.frozen import FineTuning, Images, freeze_shards
from deepclust.run.directory import Run
from deepclust.run.labels import class_names
from deepclust.trained.saved import fresh_embedder

ONE = FineTuning(epochs=1, least=2, batch=100)


def test_random_weights_are_tuned_alike_once_and_again_with_other_settings(
    final_run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(final_run, tmp_path / "run"))

    def scored(settings: FineTuning) -> dict[str, dict[str, float]]:
        beside = Beside(finetuning=settings)
        scores = evaluate.evaluate_run(run, str(shards), str(shards), ["finetune"], beside=beside)
        return {"own": scores["finetune"], **scores["baselines"]["random_weights"]}

    first, index, recipe = scored(ONE), open_index(shards), Run(run).recipe
    fresh = fresh_embedder(recipe, class_names(Run(run)))
    frozen = freeze_shards(fresh, index, index, recipe.data)
    images = Images(fresh.method.trunk, (index, index), recipe.data)
    alone = replace(frozen, images=images, seed=0, finetuning=ONE)
    assert first["finetune"] == dict(finetune(alone))
    assert first["finetune"]["steps"] == first["own"]["steps"] == 3
    kept = run / "evaluations" / "baselines"
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(baselines, "_keep", None)  # nothing is measured again
    assert scored(ONE) == first
    monkeypatch.undo()
    assert scored(replace(ONE, least=4))["finetune"]["steps"] == 4
    assert len(list(kept.iterdir())) == 2

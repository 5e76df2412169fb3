"""The scores of an evaluation, as a run's `evaluations/STEP.json` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by evaluator, of which each layer and each one of each baseline is one too."""
    baselines, layers = scores.get("baselines", {}), scores.get("layers", {})
    if not isinstance(baselines, dict) or not isinstance(layers, dict):  # it may be from anybody
        return dict(scores)
    flat = {name: values for name, values in scores.items() if name not in ("baselines", "layers")}
    flat |= {f"layer {name}": values for name, values in layers.items()}
    for baseline, values in baselines.items():
        if baseline == "rows":
            continue
        if isinstance(values, dict) and all(isinstance(one, dict) for one in values.values()):
            flat |= {f"baseline {baseline} {name}": one for name, one in values.items()}
        else:
            flat[f"baseline {baseline}"] = values
    return flat

"""The scores of an evaluation, as a run's `evaluations/STEP.json` has them."""

from __future__ import annotations

from typing import Any


def flat_scores(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return values by evaluator, of which each one of each baseline is one too."""
    baselines = scores.get("baselines")
    if not isinstance(baselines, dict):  # a record may come from anybody
        return scores
    flat = {name: values for name, values in scores.items() if name != "baselines"}
    for baseline, values in baselines.items():
        if baseline == "rows":
            continue
        if isinstance(values, dict) and all(isinstance(one, dict) for one in values.values()):
            flat |= {f"baseline {baseline} {name}": one for name, one in values.items()}
        else:
            flat[f"baseline {baseline}"] = values
    return flat

"""The bench of quality: what share of its time a run does not train."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench import quality


def at(time: float, event: str, **fields: int) -> dict[str, Any]:
    return {"event": event, "time": time, "attempt": 1, **fields}


@pytest.mark.parametrize(("second", "share"), [(1, 2 / 22), (0, 4 / 44)])
def test_the_share_of_a_round_leaves_out_the_first_and_the_final_extraction(
    second: int, share: float
) -> None:
    events = [
        at(0, "started"), at(10, "training", round=0, step=0), at(30, "clustered"),
        at(32, "training", round=second, step=4), at(54, "exported"), at(90, "finished"),
    ]  # fmt: skip
    steps = [{"step": 4, "images_per_s": 2.0}, {"step": 8, "images_per_s": 2.0}]  # of 20 s each
    assert quality.round_outside(steps, events, batch=10) == pytest.approx(share)

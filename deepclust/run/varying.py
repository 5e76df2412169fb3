"""Which numbers of the metrics are worth a curve: those that are not the same all the time.

A curve of a constant says nothing, and hides those that say something. So the first value of a
number is held back until another one comes.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

Point: TypeAlias = tuple[int, float]
PLACES = ("epoch", "step", "segment", "round")  # they say when, not what


class Varying:
    """The numbers that have varied so far; `known` is what a later one begins with."""

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        self.held: dict[str, Any] = dict(known or {})  # [step, value], or None once it has varied

    def curves(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, list[Point]]:
        """Return the points that a record of metrics adds to each curve, by `kind/name`."""
        added: dict[str, list[Point]] = {}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or name in PLACES:
                continue
            if points := self._add(f"{kind}/{name}", step, float(value)):
                added[f"{kind}/{name}"] = points
        return added

    def _add(self, name: str, step: int, value: float) -> list[Point]:
        first = self.held.setdefault(name, [step, value])
        if first is None:
            return [(step, value)]
        if value == first[1] or (math.isnan(value) and math.isnan(first[1])):
            return []
        self.held[name] = None
        return [(int(first[0]), float(first[1])), (step, value)]

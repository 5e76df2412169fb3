"""The scores in a run's `evaluations/*.json`, as numbers and tables.

Anybody may have written the files, so every value is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from deepclust.errors import DataError
from deepclust.files import fits, read_record
from deepclust.run.directory import Run
from deepclust.run.events import Number
from deepclust.run.scores import flat_scores

Record = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One number of an evaluation."""

    evaluator: str
    measure: str
    value: float
    source: str
    interval: list[float] | None = None  # 95 %, low and high
    step: int = 0


def read_scores(run: Run) -> tuple[list[Score], dict[tuple[str, str], Record]]:
    """Return the numbers of evaluations/*.json, the newest evaluation first, and its tables.

    Of the tables of one evaluator and name only the newest is returned.
    """
    scores: list[Score] = []
    tables: dict[tuple[str, str], Record] = {}
    for file in sorted((run.path / "evaluations").glob("*.json"), reverse=True):
        record = read_record(file, {"step": int, "train": str, "test": str, "scores": dict})
        source = f"step {record['step']:,}: {record['train']} → {record['test']}"
        for evaluator, values in flat_scores(record["scores"]).items():
            if not isinstance(values, dict) or not all(map(_is_value, values.values())):
                raise DataError(
                    f"{file} is damaged: its scores of {evaluator[:80]!r} are no numbers"
                )
            for name, value in values.items():
                if isinstance(value, list):
                    own = scores[-1:] if scores and scores[-1].evaluator == evaluator else []
                    scores[len(scores) - len(own) :] = [replace(one, interval=value) for one in own]
                elif isinstance(value, dict):
                    tables.setdefault((evaluator, name), {**value, "source": source})
                else:
                    scores.append(Score(evaluator, name, value, source, step=record["step"]))
    return scores, tables


def _is_value(value: Any) -> bool:
    """Return whether a value is a number, an interval of two, or a whole table.

    See `deepclust.evaluate.frozen.Value`.
    """
    if isinstance(value, list):
        return len(value) == 2 and all(fits(one, Number) for one in value)
    if not isinstance(value, dict):
        return fits(value, Number)
    rows, columns, values = (value.get(key) for key in ("rows", "columns", "values"))
    if not (isinstance(rows, list) and isinstance(columns, list) and isinstance(values, list)):
        return False
    if not all(isinstance(name, str) for name in [*rows, *columns]):
        return False
    return len(values) == len(rows) and all(
        isinstance(row, list) and len(row) == len(columns)
        and all(one is None or fits(one, Number) for one in row) for row in values
    )  # fmt: skip

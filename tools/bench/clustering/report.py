"""Medians of paired ratios, and Markdown tables of them."""

from __future__ import annotations

from statistics import median


def spread(values: list[float], shape: str = "{:.3f}") -> str:
    """The median, and the range in brackets."""
    if not values:
        return ""
    low, middle, high = (shape.format(v) for v in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low}..{high})"


def ratios(runs: list[dict], ours: str, peer: str, field: str) -> list[float]:
    """`field` of ours over the peer's, paired by seed; a seed that one failed is left out."""
    values = {
        name: {run["seed"]: run[field] for run in runs if run["name"] == name and field in run}
        for name in (ours, peer)
    }
    shared = values[ours].keys() & values[peer].keys()
    return [values[ours][seed] / values[peer][seed] for seed in sorted(shared)]


def of(runs: list[dict], name: str, field: str) -> list[float]:
    """All values of a field of one contender."""
    return [run[field] for run in runs if run["name"] == name and field in run]


def errors(runs: list[dict], name: str) -> str:
    """What went wrong with a contender, once."""
    return "; ".join(
        sorted({run["error"] for run in runs if run["name"] == name and "error" in run})
    )


def markdown(rows: list[dict]) -> str:
    """A table; the columns are the keys of all rows, in the order met."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

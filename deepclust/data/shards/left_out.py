"""A count of what a scan leaves out, by reason, so that nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

EXAMPLES = 5  # names that a message lists
_LONGEST = 120  # letters of a name in a message


def shown(name: str) -> str:
    r"""Return a name for a message: at most 120 letters, what cannot be printed as \xNN."""
    raw = (
        name[: _LONGEST + 1].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def listed(names: Iterable[str], total: int | None = None) -> str:
    """Return the first five names, and "..." if there are more of them, or `total` is more."""
    few: list[str] = []
    for name in names:
        if len(few) == EXAMPLES:
            return ", ".join([*few, "..."])
        few.append(shown(name))
    return ", ".join([*few, "..."] if total is not None and total > len(few) else few)


class Tally:
    """Counts by reason, each with its first five examples."""

    def __init__(self, counts: dict[str, dict[str, Any]] | None = None) -> None:
        """Begin with nothing, or with what `as_dict` returned."""
        self._counts: dict[str, dict[str, Any]] = {} if counts is None else counts

    def add(self, reason: str, example: str) -> None:
        """Count one more for a reason."""
        one = self._counts.setdefault(reason, {"count": 0, "examples": []})
        one["count"] += 1
        if len(one["examples"]) < EXAMPLES:
            one["examples"].append(shown(example))

    def wants(self, reason: str) -> bool:
        """Return whether another example of a reason would be kept."""
        return reason not in self._counts or len(self._counts[reason]["examples"]) < EXAMPLES

    def merge(self, other: Tally) -> None:
        """Add another tally's counts, and its examples after the own ones."""
        for reason, theirs in other._counts.items():
            one = self._counts.setdefault(reason, {"count": 0, "examples": []})
            one["count"] += theirs["count"]
            one["examples"] = [*one["examples"], *theirs["examples"]][:EXAMPLES]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return reason -> count and examples, in alphabetical order."""
        return {reason: self._counts[reason] for reason in sorted(self._counts)}

    @property
    def reasons(self) -> set[str]:
        """The reasons that were given."""
        return set(self._counts)

    @property
    def total(self) -> int:
        """The sum of all counts."""
        return sum(one["count"] for one in self._counts.values())

    def __str__(self) -> str:
        """Return "COUNT x REASON: EXAMPLES" of the five most frequent reasons."""
        order = sorted(self._counts.items(), key=lambda item: (-item[1]["count"], item[0]))
        parts = [
            f"{one['count']} x {reason}: {listed(one['examples'], one['count'])}"
            for reason, one in order[:EXAMPLES]
        ]
        return "; ".join(
            [*parts, *([f"{len(order) - EXAMPLES} more reasons"] * (len(order) > EXAMPLES))]
        )

"""A count of what a source's images are not, by reason, so that nothing is left in silence."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES = 5
_LONGEST = 200  # characters of an example


def shown(name: str) -> str:
    r"""Return a name that a terminal can show: other bytes and control characters become \xNN."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass
class _Reason:
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Tally:
    """Counts by reason, each with its first five examples in alphabetical order.

    Threads may add to it, and the result depends on what is added alone.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._reasons: dict[str, _Reason] = {}
        self._lock = threading.Lock()

    def add(self, reason: str, example: str) -> None:
        """Count one more file for a reason."""
        with self._lock:
            one = self._reasons.setdefault(reason, _Reason())
            one.count += 1
            one.examples = sorted([*one.examples, _shortened(shown(example))])[:_EXAMPLES]

    def merge(self, other: Tally) -> None:
        """Add another tally's counts and examples."""
        for reason, theirs in other._reasons.items():
            one = self._reasons.setdefault(reason, _Reason())
            one.count += theirs.count
            one.examples = sorted([*one.examples, *theirs.examples])[:_EXAMPLES]

    def __bool__(self) -> bool:
        """Return whether anything was counted."""
        return bool(self._reasons)

    def total(self) -> int:
        """Return the sum of the counts."""
        return sum(one.count for one in self._reasons.values())

    def as_dict(self) -> dict[str, int]:
        """Return the counts by reason, the reasons in alphabetical order."""
        return {reason: self._reasons[reason].count for reason in sorted(self._reasons)}

    def with_examples(self) -> dict[str, dict[str, Any]]:
        """Return reason -> count and examples, as the manifest of an index has them."""
        ordered = sorted(self._reasons.items())
        return {name: {"count": one.count, "examples": one.examples} for name, one in ordered}

    def lines(self) -> list[str]:
        """Return "COUNT REASON (EXAMPLES)" for every reason, the largest count first."""
        ordered = sorted(self._reasons.items(), key=lambda item: (-item[1].count, item[0]))
        return [f"{one.count} {reason} ({_joined(one)})" for reason, one in ordered]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 :]}"


def _joined(one: _Reason) -> str:
    return ", ".join(one.examples) + (", ..." if one.count > len(one.examples) else "")

"""The table of a fuzzer: how many cases of each kind ended how."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

OUTCOMES = ("right", "clear error", "traceback", "hang", "silently wrong")


def show(table: dict[str, Counter[str]], worst: list[str], out: Path | None) -> None:
    """Print the counts by kind and a line for each bad case, and write both as JSON to `out`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    width = max(map(len, table), default=0) + 2
    others = {name for counts in table.values() for name in counts} - {*OUTCOMES}
    names = (*OUTCOMES, *sorted(others))
    print(" " * width + "".join(f"{name:>16}" for name in names))
    for row, counts in table.items():
        print(f"{row:{width}}" + "".join(f"{counts[name]:16}" for name in names))
    print("\n".join(worst))
    if out is not None:
        out.write_text(json.dumps({"table": table, "worst": worst}, indent=1))

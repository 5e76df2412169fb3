"""Run the checks of `table.py` on a GPU: a table, JSON, and exit code 0 only if all pass.

    tools/gpu-check [--quick] [--only N ...] [--json FILE]

Without a GPU it says so and exits with 4. What is not built yet, or needs a second GPU, counts as
not passed where all checks are asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from machine import facts  # noqa: E402
from outcome import Check, Outcome, Setting  # noqa: E402
from table import CHECKS, QUICK  # noqa: E402

from deepclust.errors import ResourceError  # noqa: E402
from deepclust.launch.devices import why_no_gpu, working  # noqa: E402

LENIENT = ("not built", "not here")


def main(words: list[str] | None = None) -> int:
    """Run what is asked for and return the exit code."""
    options = parse(words)
    try:
        device = gpu()
    except ResourceError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(chosen(options), device, Path(folder))
    if options.json:
        Path(options.json).write_text(json.dumps(document(outcomes), indent=1))
    return exit_code(outcomes, whole=not options.quick and not options.only)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK}, minutes")
    numbers = [check.number for check in CHECKS]
    parser.add_argument("--only", type=int, nargs="+", choices=numbers, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(words)


def gpu() -> torch.device:
    """Return the first GPU, or raise `ResourceError` saying why there is none."""
    if not torch.cuda.is_available():
        raise ResourceError(f"{why_no_gpu()}, and every check needs one. Run it on a GPU machine.")
    return working(torch.device("cuda", 0), "CUDA_VISIBLE_DEVICES to a card that works")


def chosen(options: argparse.Namespace) -> list[Check]:
    """Return the checks that the options ask for."""
    if options.only:
        return [check for check in CHECKS if check.number in options.only]
    return list(CHECKS[:QUICK] if options.quick else CHECKS)


def run(checks: list[Check], device: torch.device, folder: Path) -> list[tuple[Check, Outcome]]:
    """Run the checks one by one, each line printed when it is known."""
    outcomes = []
    for check in checks:
        place = folder / str(check.number)
        place.mkdir()
        outcome = check.run(Setting(device, place))
        print(line(check, outcome), flush=True)
        outcomes.append((check, outcome))
    return outcomes


def line(check: Check, outcome: Outcome) -> str:
    """Return a row of the table."""
    head = f"{check.number:>2} {check.name:<14} {outcome.verdict:<9} {outcome.seconds:>7.1f} s"
    return f"{head}  {outcome.text}"


def document(outcomes: list[tuple[Check, Outcome]]) -> dict[str, object]:
    """Return the JSON: the machine, and every check with its numbers."""
    return {
        "machine": facts(),
        "checks": [
            {"number": check.number, "name": check.name, "asks": check.asks,
             "verdict": outcome.verdict, "text": outcome.text, "seconds": outcome.seconds,
             "numbers": outcome.numbers}
            for check, outcome in outcomes
        ],
    }  # fmt: skip


def exit_code(outcomes: list[tuple[Check, Outcome]], whole: bool) -> int:
    """Return 0 if all passed; what is not built or not here counts where all were asked for."""
    allowed = ("pass",) if whole else ("pass", *LENIENT)
    return 0 if all(outcome.verdict in allowed for _, outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

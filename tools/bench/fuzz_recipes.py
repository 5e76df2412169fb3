"""Read thousands of random recipes, and count what becomes of them.

    python -m tools.bench.fuzz_recipes [--count 5000] [--seed 0] [--out table.json]

Trees are shipped recipes with values, keys and sections exchanged for anything. Texts are YAML with
bytes flipped, cut and doubled. Overrides are random keys and values. Outcomes: right (it loads, and
what it dumps loads as the same), clear error (a RecipeError of at most 20,000 letters), traceback,
hang (10 s), silently wrong (it loads as another recipe after a dump).
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from deepclust.errors import RecipeError
from deepclust.recipe import Recipe, shipped
from deepclust.recipe.recipe import read_tree
from tools.bench.outcomes import show

HANG_S = 10
LONGEST = 20_000
Case = Callable[[], Recipe]


class Hang(BaseException):
    """A recipe that was not read in time."""


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table, worst = fuzz(args.count, args.seed)
    show(table, worst, args.out)


def fuzz(count: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return the counts of outcomes by kind of case, and a line for each bad one."""
    draws = random.Random(seed)
    table: dict[str, Counter[str]] = {
        "trees": Counter(),
        "texts": Counter(),
        "overrides": Counter(),
    }
    worst: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-recipes-") as folder:
        for number in range(count):
            kind = ("trees", "trees", "texts", "overrides")[number % 4]
            case, shown = CASES[kind](draws, Path(folder))
            outcome, why = judge(case)
            table[kind][outcome] += 1
            if outcome not in ("right", "clear error"):
                worst.append(f"{outcome}: {why} of {shown[:300]!r}")
    return table, worst


def judge(case: Case) -> tuple[str, str]:
    """Return the outcome of reading a recipe, and why."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(HANG_S)
    began = time.monotonic()
    try:
        recipe = case()
        tree = yaml.safe_load(recipe.dump())
        is_same = Recipe.parse(tree).flat() == recipe.flat()
        return ("right", "") if is_same else ("silently wrong", "its dump is another recipe")
    except RecipeError as error:
        return ("clear error", "") if len(str(error)) <= LONGEST else ("traceback", "too long")
    except Hang:
        return "hang", f"{time.monotonic() - began:.0f} s"
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)


def a_tree(draws: random.Random, folder: Path) -> tuple[Case, str]:
    """A shipped recipe in which some values, keys and sections are anything."""
    tree, changes = whole(draws), []
    for _ in range(draws.choice((1, 1, 2, 4))):
        holder = tree
        while (inner := [v for v in holder.values() if isinstance(v, dict) and v]) and (
            draws.random() < 0.7
        ):
            holder = draws.choice(inner)
        key = draws.choice([*holder, *KEYS])
        if draws.random() < 0.1:
            holder.pop(key, None)
        else:
            holder[key] = anything(draws, 0)
            value = holder[key]
            is_plain = not isinstance(value, dict | list | tuple)
            is_shown = is_plain and value != TOO_LONG
            changes.append(f"{key}={repr(value)[:80] if is_shown else type(value).__name__}")
    return lambda: Recipe.parse(tree), " ".join(changes)


def a_text(draws: random.Random, folder: Path) -> tuple[Case, str]:
    """A recipe's YAML with damaged bytes."""
    data = bytearray(yaml.safe_dump(whole(draws)).encode())
    for _ in range(draws.choice((1, 2, 5))):
        place = draws.randrange(len(data))
        end = place + draws.randrange(40)
        action = draws.randrange(4)
        if action == 0:
            data[place] = draws.randrange(256)
        elif action == 1:
            del data[place:end]
        elif action == 2:
            data[place:place] = data[place:end]
        else:
            data[place:place] = draws.choice(TOKENS).encode()
        data = data or bytearray(b" ")
    file = folder / "r.yaml"
    file.write_bytes(data)
    return lambda: Recipe.load(file), data.decode(errors="replace")


def an_override(draws: random.Random, folder: Path) -> tuple[Case, str]:
    """A shipped recipe with overrides of any key."""
    words = []
    for _ in range(draws.choice((1, 2, 3))):
        section = draws.choice((*whole(draws), *KEYS))
        key = draws.choice(KEYS)
        plain = [
            str(one) for one in VALUES if isinstance(one, str | int | float) and one != TOO_LONG
        ]
        value = draws.choice([*TOKENS, *plain])
        words.append(f"{section}.{key}={value}" if draws.random() < 0.9 else f"{section}={value}")
    return lambda: Recipe.load("small-photos", "data.shards=x", *words), repr(words)


def whole(draws: random.Random) -> dict[str, Any]:
    """A shipped recipe, all its keys given."""
    name = draws.choice(shipped())
    return dict(copy.deepcopy(Recipe.parse({**read_tree(name)}).model_dump(mode="json")))


def anything(draws: random.Random, level: int) -> Any:
    """Any value that a YAML file or a caller can give."""
    made = draws.choice(VALUES)
    if level < 4 and draws.random() < 0.3:
        count = draws.randrange(4)
        if draws.random() < 0.5:
            return [anything(draws, level + 1) for _ in range(count)]
        return {draws.choice(KEYS): anything(draws, level + 1) for _ in range(count)}
    return copy.copy(made)


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def _deep() -> Any:
    value: Any = 1
    for _ in range(3000):
        value = [value]
    return value


def _laughs() -> Any:
    value: Any = ["ha"] * 9
    for _ in range(12):
        value = [value] * 9
    return value


KEYS = ("name", "k", "epochs", "batch", "lr", "shards", "labels", "a", "on", "", "x.y", "weight",
        "ranks", "every", "size", "local", "blur", "nodes", "address", "env", "\ud800")  # fmt: skip
TOKENS = ("null", "[", "{", "*a", "&a ", "!!binary ", "!!python/object:os.system ", "2001-99-99",
          "9" * 5000, "- ", ": ", "\n\n", "~", ".nan", "1e400", "yes", "<<: *a", "? ", "|",
          "[" * 2000, "{a: " * 500, "!!set {a}", "!!timestamp x", "0x10", "1_000", "\t", "\0",
          "&a [*a]", "-1", "0", "1 epoch", "os.path", "shards", "{0..9}", "%", "@")  # fmt: skip
TOO_LONG = 10**5000  # digits, which Python does not print
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, TOO_LONG, 0.0, -0.5, math.nan, math.inf, "", "x",
    "9" * 5000, "x" * 100_000, "\0", "\ud800", "1 epoch", "0 epochs", "[" * 100, b"bytes", {1, 2},
    date(2001, 1, 1), 1j, object(), (1, 2), [1] * 1000, {"a": 1}, {1: 2}, {None: 3}, {(1,): 2},
    _circle(), _deep(), _laughs(), "simclr", "deepercluster", "resnet50", "auto", "os.path",
]  # fmt: skip
CASES = {"trees": a_tree, "texts": a_text, "overrides": an_override}


def _hangs(number: int, frame: object) -> None:
    raise Hang


if __name__ == "__main__":
    main()

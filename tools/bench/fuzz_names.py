"""Give odd URLs and odd names to whatever takes one, and count what becomes of them.

    python -m tools.bench.fuzz_names [--count 2000] [--seed 0] [--out table.json]

URLs go through a recipe, the expansion of shards (whose network is replaced) and the places that a
user has named. Names are those of runs (made, shown by `status`, reported), of shards, of keys, of
classes and of recipes. Outcomes: right, clear error (a DeepclustError), traceback, hang (20 s),
silently wrong: a secret is shown, another key is read, a terminal escape is printed, or something
is written beside the folder of the case.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from rich.console import Console

from cluster_jobs.data_places import places_of
from cluster_jobs.display import status_table
from cluster_jobs.report import write_report
from cluster_jobs.status import status
from deepclust.data.pack.pack import pack
from deepclust.data.shards import remote
from deepclust.data.shards.find import described, expand
from deepclust.data.shards.index import open_index
from deepclust.data.shards.url import is_url
from deepclust.errors import DeepclustError
from deepclust.files import path_of
from deepclust.launch.start import prepare_run
from deepclust.recipe import Recipe
from deepclust.run.directory import Run
from tests.images import draw, encode, write_tar
from tools.bench.outcomes import show

HANG_S = 20
SECRET = "hunter2secret"
SCHEMES = (
    "http://", "https://", "s3://", "gs://", "file://", "HTTP://", "ftp://", "zip://",
    "reference://", "://", "//", "http:/", "pipe:", "local:", "", "a+b://", "\0://",
)  # fmt: skip
HOSTS = (
    "h", "h:80", "h:99999", "h:-1", "h:x", "[::1", "[::1]", "\u00fc.de", "", ".", "..", "h h",
    f"u:{SECRET}@h", f"u:p@{SECRET}@h", f"u:{SECRET}/x@h", "127.0.0.1:1", "%00", "h\n",
)  # fmt: skip
PATHS = (
    "/x.tar", "/", "", "/%00.tar", "/a b.tar", "/{0..3}.tar", "/{0..999999999999}.tar", "/*.tar",
    "/..", "/%2e%2e/x.tar", "/x.tar::file:///etc", f"/x.tar?sig={SECRET}", "/\u65e5.tar", "/{",
    f"/x.tar?a=b&token={SECRET}#f", f"/{'x' * 5000}.tar", "/\x1b[2J.tar", "/a%2fb.tar",
)  # fmt: skip
PARTS = (
    "a", "..", ".", "/", "\n", "\r", "\x1b[2J", "\x1b]0;x\x07", "\u00fc", "\u65e5\u672c", "\0",
    "\u202e", "\udce9", "\udcff", "-x", "--run", "con", "nul", "x" * 255, "x" * 300, " ", "'",
    '"', "$(id)", "`id`", "{", "}", "%", "#", "=", "~", "\\", "*", "[a]", "\ufeff",
)  # fmt: skip


class Hang(BaseException):
    """A case that did not end in time."""


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    show(*fuzz(args.count, args.seed), args.out)


def fuzz(count: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return the counts of outcomes by kind of case, and a line for each bad one."""
    draws = random.Random(seed)
    table: dict[str, Counter[str]] = {kind: Counter() for kind in CASES}
    worst = []
    before = signal.signal(signal.SIGALRM, _hangs)
    try:
        for number in range(count):
            kind = [*CASES][number % len(CASES)]
            name = a_url(draws) if kind == "urls" else a_name(draws)
            outcome, why = run_case(CASES[kind], name)
            table[kind][outcome] += 1
            if outcome not in ("right", "clear error"):
                worst.append(f"{kind} {name!a:.200}: {outcome}: {why!a:.300}")
    finally:
        signal.signal(signal.SIGALRM, before)
    return table, worst


def run_case(case: Callable[[str, Path], str], name: str) -> tuple[str, str]:
    """Return the outcome of a case in a folder of its own, and why it is none of the good ones."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "outer", "folder")
        folder.mkdir(parents=True)
        signal.alarm(HANG_S)
        try:
            wrong = case(name, folder)
            outcome = "silently wrong" if wrong else "right"
        except DeepclustError as error:
            wrong, outcome = "", "clear error"
            if SECRET in str(error) and is_url(name):
                wrong, outcome = f"shows a secret: {error}", "silently wrong"
        except Hang:
            wrong, outcome = "", "hang"
        except Exception as error:
            wrong, outcome = f"{type(error).__name__}: {error}", "traceback"
        finally:
            signal.alarm(0)
        beside = [str(p) for p in Path(root).rglob("*") if folder not in (p, *p.parents)]
        if strays := [p for p in beside if p != str(folder.parent)]:
            return "silently wrong", f"wrote {strays}"
        return outcome, wrong


def a_url(draws: random.Random) -> str:
    """A scheme, a host and a path, each from a table."""
    return draws.choice(SCHEMES) + draws.choice(HOSTS) + draws.choice(PATHS)


def a_name(draws: random.Random) -> str:
    """One to three odd parts."""
    return "".join(draws.choice(PARTS) for _ in range(draws.randint(1, 3)))


def _url(url: str, folder: Path) -> str:
    recipe = Recipe.load("small-photos").replace(f"data.shards={url}")
    texts = [recipe.show(), described(url), *places_of(recipe)]
    with (
        mock.patch.object(remote, "with_sizes", list),
        mock.patch.object(remote, "list_folder", return_value=[]),
    ):
        texts += map(str, expand(url))
    return next((f"shows a secret: {text}" for text in texts if SECRET in text and is_url(url)), "")


def _run(name: str, folder: Path) -> str:
    if leads_out(name):  # the user may name any folder; one below this one is tried
        return ""
    run = path_of(str(folder / name), "run")
    prepare_run(RECIPE, run)
    page = write_report(run, folder / "report.html").read_text(encoding="utf-8")
    console = Console(file=io.StringIO(), width=200)
    console.print(status_table([status(Run(run))]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return "prints an escape" if "\x1b" in printed else "" if page else "no page"


def _shard(name: str, folder: Path) -> str:
    if leads_out(name) or "/" in name or "\0" in name or len(os.fsencode(name)) > 250:
        return ""  # no file can have that name
    write_tar(folder / "s" / f"{name}.tar", [("a.png", IMAGE)])
    index = open_index(folder / "s", folder / "index")
    return "" if index.where(0).isprintable() else f"shows {index.where(0)}"


def _key(name: str, folder: Path) -> str:
    write_tar(folder / "s.tar", [("first.png", IMAGE), (f"{name}.png", IMAGE)])
    index = open_index(folder / "s.tar", folder / "index")
    known = len(index) + sum(one["count"] for one in index.manifest.get("left_out", {}).values())
    return "" if known == 2 else f"{known} of 2 members are accounted for"


def _class(name: str, folder: Path) -> str:
    place = folder / "photos" / name
    if leads_out(name) or "\0" in name or max(map(len, os.fsencode(name).split(b"/"))) > 255:
        return ""  # no folder can have that name
    place.mkdir(parents=True, exist_ok=True)
    (place / "a.png").write_bytes(IMAGE)
    said: list[str] = []
    index = pack(folder / "photos", folder / "out", emit=said.append)
    return "" if len(index) == 1 and all(map(str.isprintable, said)) else f"{len(index)} {said}"


def _recipe(name: str, folder: Path) -> str:
    return f"is a recipe: {Recipe.load(name)}"


def leads_out(name: str) -> bool:
    """Return whether a name is a path that leads out of the folder that it is in."""
    return name.startswith("/") or os.path.normpath(name).startswith("..") or not name.strip("./")


def _hangs(number: int, frame: object) -> None:
    raise Hang


IMAGE = encode(draw(0, 8, 8))
RECIPE = Recipe.load("small-photos", "data.shards=/nowhere")
CASES = {"urls": _url, "runs": _run, "shards": _shard, "keys": _key, "classes": _class,
         "recipes": _recipe}  # fmt: skip


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")

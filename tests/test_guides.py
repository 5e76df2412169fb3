"""The commands of the README and the guides work: they run on tiny images, or they are dry-run.

Every block of code is marked: `run` is executed here as it is written, except for SMALLER and TINY.
A block with the name of a file is written there.
The commands of a `check` block need a cluster or hours. They are parsed by the real command line,
their keys by the real recipe, and `submit` by `--dry-run`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import click
import numpy as np
import pytest
import typer

from cluster_jobs import guides
from cluster_jobs.cli import app
from deepclust.data.pack.pack import pack
from deepclust.recipe import Recipe
from tests.data.shards.servers import web
from tests.images import draw, encode, make_shards

ROOT = Path(__file__).parents[1]
PAGES = {"README": (ROOT / "README.md").read_text(), **{n: guides.read(n) for n in guides.names()}}
BLOCK = re.compile(r"^```(\S+) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = {"--k 1000": "--k 10", "--whiten 256": "--whiten 8", "train.epochs=60": "train.epochs=2"}
TINY = [
    "backbone.name=conv4", "data.size=16", "data.resize=16", "data.workers=0", "cluster.k=8",
    "cluster.dim=8", "cluster.iterations=3", "train.batch=24", "train.threads=1", "train.epochs=1",
    "train.device=cpu",
]  # fmt: skip
OTHERS = {"python", "sbatch", "pip", "RAY_worker_niceness=0"}
COMMANDS = cast(click.Group, typer.main.get_command(app))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make what the guides assume: photos in class folders, labels, features, a web server."""
    rows = ["key,class"]
    for i in range(120):
        photo = tmp_path / "my_photos" / f"class{i % 4}" / f"{i:03}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(encode(draw(i, 24, 32, label=i % 4), "jpg"))
        rows += [f"class{i % 4}/{i:03},class{i % 4}"] * (i < 24)
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    pack(tmp_path / "my_photos", tmp_path / "test_shards", seed=1)
    make_shards(tmp_path / "served", n=60, shards=3, size=16)
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(300, 16)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with web(tmp_path / "served") as server:
        monkeypatch.setitem(SMALLER, "https://host/dir", server.url)
        yield


def blocks(page: str, mark: str) -> list[tuple[str, str]]:
    """Return language and code of the blocks of a page with this mark."""
    return [(language, code) for language, how, code in BLOCK.findall(PAGES[page]) if how == mark]


def run(code: str) -> None:
    """Execute commands in this process, smaller."""
    for text, smaller in SMALLER.items():
        code = code.replace(text, smaller)
    for line in code.replace(" && ", "\n").splitlines():
        words = shlex.split(line)
        tiny = smaller_recipe(words[2]) if words[1] == "pretrain" else []
        if network := [word for word in words if word.startswith("backbone.name=")]:
            tiny += network  # the page needs this one
        COMMANDS.main([*words[1:], *tiny], standalone_mode=False)


def smaller_recipe(name: str) -> list[str]:
    """Return the overrides that make a recipe tiny: without clusters if it has none."""
    clusters = Recipe.load(name).cluster is not None
    return [one for one in TINY if clusters or not one.startswith("cluster.")]


def check(line: str) -> None:
    """Parse a command, validate its keys, and dry-run a submission; files of ours must exist."""
    words = shlex.split(line, comments=True)
    for file in (word for word in words if word.startswith(("tools/", "slurm/"))):
        assert (ROOT / file).exists(), file
    if words[0] != "deepclust":
        assert words[0].startswith("tools/") or words[0] in OTHERS, line
        return
    parsed = COMMANDS.commands[words[1]].make_context(words[1], words[2:]).params
    if words[1] == "submit":
        COMMANDS.main([*words[1:], "--dry-run"], standalone_mode=False)
    Recipe.load(parsed.get("recipe") or "small-photos", *(parsed.get("overrides") or []))


def test_every_block_is_marked() -> None:
    for page, text in PAGES.items():
        marks = [mark for _, mark, _ in BLOCK.findall(text)]
        assert len(marks) * 2 == len(re.findall("^```", text, re.MULTILINE)), page
        assert all(mark in ("run", "check") or mark.endswith(".py") for mark in marks), page


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_need_a_cluster_are_parsed(page: str) -> None:
    for _, code in blocks(page, "check"):
        for line in code.splitlines():
            check(line)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "run")])
def test_the_commands_of_a_page_run(page: str) -> None:
    code = "".join(code for _, code in blocks(page, "run"))
    if "deepclust pack" not in code:
        run("deepclust pack my_photos shards")
    if "runs/mine" in code and "--run runs/mine" not in code:
        run("deepclust pretrain small-photos --run runs/mine data.shards=shards")
    for language, mark, code in BLOCK.findall(PAGES[page]):
        if mark.endswith(".py"):
            Path(mark).parent.mkdir(exist_ok=True)
            Path(mark).write_text(code)
        elif mark == "run" and language == "sh":
            run(code)
        elif mark == "run":
            overrides = ", ".join(map(repr, ["data.shards=shards", *TINY]))
            exec(code.replace('"data.shards=shards"', overrides), {})

"""The README and the guides tell the truth: their commands, keys, files and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from cluster_jobs import guides
from cluster_jobs.cli import app
from deepclust.recipe import Recipe, shipped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *map(guides.read, guides.names())]
SECTIONS = "data|backbone|cluster|method|train|init|seeds"


def test_every_command_in_the_text_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verbs = {
        verb for page in PAGES for verb in re.findall(r"(?:^|`)deepclust ([a-z]+)", page, re.M)
    }
    assert len(verbs) > 10
    assert verbs <= commands.keys()


def test_the_readme_is_short_and_has_a_picture() -> None:
    assert len(README.splitlines()) <= 170
    (picture,) = re.findall(r"!\[.+\]\((.+\.png)\)", README)
    assert (ROOT / picture).stat().st_size < 150_000


def test_every_guide_is_in_the_readme_and_in_the_list_with_a_sentence() -> None:
    for name in guides.names():
        assert f"[{name}](cluster_jobs/guides/{name}.md)" in README
        title, blank, sentence, after = guides.read(name).split("\n", 4)[:4]
        assert title.startswith("# ")
        assert (blank, after) == ("", "")
        assert sentence.endswith(".")
        assert f"{name} " in guides.contents()


def test_every_folder_of_the_packages_is_on_the_map_and_every_file_of_the_map_exists() -> None:
    chart = README.split("## Map")[1].split("##")[0]
    for package in ("deepclust", "cluster_jobs"):
        for path in (ROOT / package).glob("*/__init__.py"):
            assert f"{path.parent.name}/" in chart, path.parent
    for name in re.findall(r"\b[\w/]+\.py\b", chart):
        assert list(ROOT.glob(f"*/**/{name}")), name


def test_every_shipped_recipe_and_every_key_of_the_guides_exists() -> None:
    for name in shipped():
        assert f"`{name}`" in guides.read("recipes")
    keys = Recipe.load("small-photos").flat().keys() | {"cluster.supers"}
    keys |= Recipe.load("small-photos", "seeds.labels=shards").flat().keys()
    named = {key for page in PAGES for key in re.findall(rf"`((?:{SECTIONS})\.\w+)", page)}
    assert len(named) > 20
    assert named <= keys, named - keys


def test_every_dependency_has_a_reason() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = pyproject.split("dependencies = [")[1].split("]")[0]
    reasons = README.split("## Dependencies")[1].split("##")[0]
    for package in re.findall(r'"([\w-]+)', block):
        assert package in reasons, package


def test_every_measurement_names_a_file_of_the_benches() -> None:
    table = README.split("## Results")[1].split("##")[0]
    for name in re.findall(r"\| `([\w/.]+)[^`]*` \|$", table, re.MULTILINE):
        assert (ROOT / "tools/bench" / name).exists(), name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

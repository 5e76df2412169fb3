"""The README tells the truth: its files exist, its verbs and recipes are there."""

from __future__ import annotations

import re
from pathlib import Path

from deepclust.recipe import Recipe, shipped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_verb_of_the_readme_is_a_command() -> None:
    cli = (ROOT / "cluster_jobs" / "cli.py").read_text()
    verbs = set(re.findall(r"^    deepclust (\w+)", README, re.M))
    assert len(verbs) > 5
    assert all(f"def {verb}(" in cli for verb in verbs)


def test_every_folder_of_the_packages_is_on_the_map_and_every_file_of_the_map_exists() -> None:
    chart = README.split("## Map")[1].split("##")[0]
    for package in ("deepclust", "cluster_jobs"):
        for path in (ROOT / package).glob("*/__init__.py"):
            assert f"{path.parent.name}/" in chart, path.parent
    for name in re.findall(r"\b[\w/]+\.py\b", chart):
        assert list(ROOT.glob(f"*/**/{name}")), name


def test_every_shipped_recipe_and_every_key_of_the_table_exists() -> None:
    for name in shipped():
        assert f"`{name}`" in README
    keys = Recipe.load("small-photos").flat()
    table = README.split("## Recipes")[1].split("##")[0]
    named = set(re.findall(r"`((?:data|backbone|cluster|method|train|init)\.\w+)`", table))
    assert len(named) >= 10
    assert named <= keys.keys()


def test_every_dependency_has_a_reason() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = pyproject.split("dependencies = [")[1].split("]")[0]
    reasons = README.split("## Dependencies")[1].split("##")[0]
    for package in re.findall(r'"([\w-]+)', block):
        assert package in reasons, package


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

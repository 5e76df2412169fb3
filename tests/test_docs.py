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


def test_every_file_of_the_map_exists() -> None:
    names = set(re.findall(r"\b[\w/]+\.py\b", README.split("## Map")[1].split("##")[0]))
    assert len(names) > 15
    for name in names:
        assert any((ROOT / room / name).exists() for room in ("deepclust", "cluster_jobs")), name


def test_every_module_of_the_science_is_on_the_map() -> None:
    chart = README.split("## Map")[1].split("##")[0]
    for path in (ROOT / "deepclust").glob("*.py"):
        assert path.name in chart or path.name == "__init__.py", path.name


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

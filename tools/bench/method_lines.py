#!/usr/bin/env python3
"""How many files and lines did each method take, and which shared parts does it use?

    python tools/bench/method_lines.py

Counted are all lines of the Python files in a method's folder, with docstrings and blank lines.
Parts are the modules of `deepclust/methods/parts` that these files import. Methods are those whose
folders they import from.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust.methods import METHODS  # noqa: E402

FOLDER = "deepclust.methods."


def main() -> None:
    """Print the table, and the lines of the parts."""
    print("| method | files | lines | shared parts | builds on |\n|---|---|---|---|---|")
    for name, package in METHODS.items():
        files = python_files(package)
        used = {module for file in files for module in imported(file)}
        parts = sorted(one.removeprefix("parts.") for one in used if one.startswith("parts."))
        own = package.removeprefix(FOLDER)
        folders = {one.split(".")[0] for one in used if "." in one} - {own, "parts", "terms"}
        cells = [name, len(files), sum(map(lines, files)), ", ".join(parts)]
        print("| " + " | ".join(map(str, [*cells, ", ".join(sorted(folders))])) + " |")
    parts_files = python_files(FOLDER + "parts")
    print(f"\nparts: {len(parts_files)} files, {sum(map(lines, parts_files)):,} lines")


def python_files(package: str) -> list[Path]:
    """Return the files of a package."""
    return sorted(ROOT.joinpath(*package.split(".")).glob("*.py"))


def lines(file: Path) -> int:
    """Return the lines of a file."""
    return len(file.read_text().splitlines())


def imported(file: Path) -> set[str]:
    """Return the modules below `deepclust.methods` that a file imports from."""
    nodes = ast.walk(ast.parse(file.read_text()))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.removeprefix(FOLDER) for name in names if name.startswith(FOLDER)}


if __name__ == "__main__":
    main()

"""What the tools import from the packages is there: mypy and most tests do not read them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = sorted((ROOT / "tools").rglob("*.py"))


def imports_of(tool: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of all that a file imports from our packages, in functions too."""
    for node in ast.walk(ast.parse(tool.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("deepclust", "cluster_jobs")
        ):
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: str(tool.relative_to(ROOT)))
def test_names_that_a_tool_imports_exist(tool: Path) -> None:
    for module, name in imports_of(tool):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")

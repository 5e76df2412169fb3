"""The modules of `tools/gpu_check`, imported as the program itself imports them: by short names."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tools" / "gpu_check"


@contextlib.contextmanager
def modules() -> Iterator[dict[str, Any]]:
    """What the program has: its own names, and its modules by theirs."""
    names = [file.stem for file in FOLDER.glob("*.py") if file.stem != "__main__"]
    scope: dict[str, Any] = {"__name__": "gpu_check", "__file__": str(FOLDER / "__main__.py")}
    sys.path.insert(0, str(FOLDER))
    try:
        found = {name: importlib.import_module(name) for name in names}
        exec(compile((FOLDER / "__main__.py").read_text(), "__main__.py", "exec"), scope)
        yield {**scope, **found}
    finally:
        sys.path[:] = [path for path in sys.path if path != str(FOLDER)]
        for name in names:
            sys.modules.pop(name, None)

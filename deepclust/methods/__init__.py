"""The table of methods: a name in the recipe, and the folder of its `config.py` and `method.py`.

Nothing here imports torch. `tests/toys/method.py` shows a method that needs no row of this table.
"""

from __future__ import annotations

METHODS = {
    name: f"deepclust.methods.{name.replace('-', '_')}"
    for name in (
        "deepcluster", "deepercluster", "deepcluster-v2", "sela",
        "swav", "dino",
        "simclr", "moco-v2", "moco-v3", "byol",
        "supervised",
        "dac",
        "suave", "daino",
    )
}  # fmt: skip
DEFAULT = "deepcluster"  # where the recipe names none

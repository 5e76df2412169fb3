"""The table of terms: a name in the recipe, and the folder of its `config.py` and `term.py`.

A term is a weighted regulariser that any method can carry. Nothing here imports torch.
"""

from __future__ import annotations

TERMS = {
    name: f"deepclust.methods.terms.{name}"
    for name in (
        "mean_entropy",
        "cm", "pseudo_label", "vat",
    )
}  # fmt: skip

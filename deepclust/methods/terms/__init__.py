"""The table of terms: a name in the recipe, and the folder of its `config.py` and `term.py`.

A term is a weighted regulariser that any method can carry. Nothing here imports torch.
"""

from __future__ import annotations

TERMS = {"mean_entropy": "deepclust.methods.terms.mean_entropy"}

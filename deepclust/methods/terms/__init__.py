"""The table of terms: a name in the recipe, and the folder of its `config.py` and `term.py`.

A term is a weighted regulariser that any method can carry. Nothing here imports torch.
"""

from __future__ import annotations

_FOLDER = "deepclust.methods.terms"
TERMS = {
    "mean_entropy": f"{_FOLDER}.batch_entropy",  # its first name: the entropy of the mean
    "batch_entropy": f"{_FOLDER}.batch_entropy",
    "sample_entropy": f"{_FOLDER}.sample_entropy",
    "locality": f"{_FOLDER}.locality",
    "cm": f"{_FOLDER}.cm",
    "pseudo_label": f"{_FOLDER}.pseudo_label",
    "vat": f"{_FOLDER}.vat",
}
OLD_NAMES = {  # a name that old recipes have, and what a new run then says
    "mean_entropy": "terms.mean_entropy is the old name of terms.batch_entropy, which makes the "
    "entropy of the mean answer large. The mean of the entropies, made small, is "
    "terms.sample_entropy: name the one that you mean",
}

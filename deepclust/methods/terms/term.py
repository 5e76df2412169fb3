"""The contract of a term: a weighted regulariser that any method can carry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from deepclust.methods.terms import TERMS
from deepclust.recipe.named import part_of
from deepclust.recipe.sections import TermSection

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Now, Output, Setting


class Term(nn.Module, ABC):
    """A scalar that is added to the loss, times a weight that may grow from 0.

    A term is a child of the method, so its parameters are trained and saved. It works on what the
    method computed in this step, or calls the method for more.
    """

    def __init__(self, config: TermSection, width: int, setting: Setting) -> None:
        """Build the term for features of this width.

        Weights depend on `setting.seed` alone.
        """
        super().__init__()
        self.weight, self.ramp = config.weight, config.ramp

    def attach(self, method: Method) -> None:
        """Look at the whole method once, before it is trained.

        Raises RecipeError where the term cannot be computed for it.
        """

    def before_loss(self) -> None:
        """Prepare for the method's loss, in every step."""

    @abstractmethod
    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return the term, without its weight: a mean over this rank's samples."""

    def weight_at(self, now: Now) -> float:
        """Return the weight of a step: linear from 0 over `ramp` epochs, then constant."""
        return self.weight * (min(1.0, now.epochs / self.ramp) if self.ramp else 1.0)


def build_terms(width: int, setting: Setting) -> nn.ModuleDict:
    """Return the terms of a recipe by name, in its order, for features of this width.

    A dot in a name becomes an underscore.
    """
    return nn.ModuleDict(
        {
            name.replace(".", "_"): part_of(name, TERMS, "term")(section, width, setting)
            for name, section in setting.terms.items()
        }
    )


def attach_terms(method: Method) -> None:
    """Let every term of a method see the whole of it."""
    for term in method.terms.values():
        assert isinstance(term, Term)
        term.attach(method)

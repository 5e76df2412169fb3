"""A teacher: the exponential moving average of a student's parameters.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017. Buffers are not
averaged: a batch norm of the teacher has statistics from the teacher's own forward passes.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """Copies of some modules by name, as its children, which no gradient reaches.

    `Teacher(backbone=backbone, head=head)` has the children `backbone` and `head`. A method whose
    section declares `trunk = "teacher.backbone"` exports the former.
    """

    def __init__(self, **students: nn.Module) -> None:
        super().__init__()
        for name, student in students.items():
            self.add_module(name, copy.deepcopy(student).requires_grad_(False))

    @torch.no_grad()
    def follow(self, momentum: float, **students: nn.Module) -> None:
        """Move every parameter: teacher = momentum * teacher + (1 - momentum) * student."""
        for name, student in students.items():
            mine: list[Tensor] = list(self.get_submodule(name).parameters())
            theirs: list[Tensor] = list(student.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - momentum)


def cosine_momentum(start: float, progress: float) -> float:
    """Return a momentum that rises from `start` to 1 by a half cosine over the run.

    BYOL (Grill et al. 2020, section 3.2): tau = 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2. `progress`
    is k / K.
    """
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2

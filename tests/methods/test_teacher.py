from __future__ import annotations

import pytest
import torch
from torch import nn

from deepclust.methods.parts.teacher import Teacher, cosine_momentum


def test_it_is_the_moving_average_of_the_students_parameters() -> None:
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    teacher, start = Teacher(net=student), student.weight.detach().clone()
    expected = start.double()
    for _ in range(5):
        with torch.no_grad():
            student.weight.add_(torch.randn(2, 3))
        teacher.follow(0.9, net=student)
        expected = 0.9 * expected + 0.1 * student.weight.detach().double()
    torch.testing.assert_close(teacher.net.weight.double(), expected, rtol=0, atol=1e-6)


def test_a_momentum_of_0_copies_and_of_1_keeps() -> None:
    student = nn.Linear(3, 2)
    teacher = Teacher(net=student)
    before = teacher.net.weight.clone()
    nn.init.ones_(student.weight)
    teacher.follow(1.0, net=student)
    assert torch.equal(teacher.net.weight, before)
    teacher.follow(0.0, net=student)
    assert torch.equal(teacher.net.weight, student.weight)


def test_no_gradient_reaches_it_and_its_state_is_saved() -> None:
    teacher = Teacher(net=nn.BatchNorm1d(2))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {"net.weight", "net.running_mean"} <= teacher.state_dict().keys()


def test_statistics_of_a_batch_norm_are_its_own() -> None:
    student = nn.BatchNorm1d(2)
    teacher = Teacher(net=student)
    student(torch.randn(8, 2) + 5)
    teacher.follow(0.0, net=student)
    assert torch.equal(teacher.net.running_mean, torch.zeros(2))


def test_a_momentum_rises_from_its_start_to_1() -> None:
    assert [cosine_momentum(0.9, t) for t in (0, 0.5, 1)] == pytest.approx([0.9, 0.95, 1.0])
    steps = [cosine_momentum(0.996, t / 10) for t in range(11)]
    assert steps == sorted(steps)

"""Suave and Daino: one cross-entropy for labelled and unlabelled rows, and Suave's prior."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods import METHODS
from deepclust.methods.base import Batch, Now, Setting
from deepclust.methods.daino.method import Method as Daino
from deepclust.methods.parts.labelled import labelled
from deepclust.methods.suave.method import Method as Suave
from deepclust.models import build_backbone
from deepclust.recipe.named import part_of
from deepclust.stages.build import wrap_ddp
from deepclust.trained.answers import parts_of
from deepclust.world import ALONE, World
from tests.methods.cases import CLASSES, batch, method, mixed, recipe
from tests.methods.cases import share as part_of_batch
from tests.ranks import on_ranks

ONE_SIZE = "data.local=null"


def suave(*overrides: str, world: World = ALONE) -> Suave:
    torch.manual_seed(0)
    one = method(recipe("suave", ONE_SIZE, *overrides), world)
    assert isinstance(one, Suave)
    return one


def daino(*overrides: str) -> Daino:
    torch.manual_seed(0)
    one = method(recipe("daino", ONE_SIZE, *overrides))
    assert isinstance(one, Daino)
    return one


def given(name: str = "suave") -> Batch:
    return batch(recipe(name, ONE_SIZE, "seeds.mix=null"))


def with_labels(of: Batch, labels: Tensor) -> Batch:
    return replace(of, labels=labels)


def with_mixtures(of: Batch) -> Batch:
    """The batch with every other label mixed with the first class."""
    labels, _, soft = mixed(of.labels, torch.Generator().manual_seed(1))
    return replace(of, labels=labels, soft=soft)


def test_a_labelled_row_takes_its_class_and_free_prototypes_get_nothing_of_it() -> None:
    targets, labels = torch.rand(2, 3, 5), torch.tensor([-1, 1, 0])
    changed = labelled(targets, with_labels(given(), labels), classes=3, smoothing=0.3)
    assert torch.equal(changed[:, 0], targets[:, 0])
    torch.testing.assert_close(changed[0, 1:], torch.tensor([[0.1, 0.8, 0.1, 0, 0],
                                                             [0.8, 0.1, 0.1, 0, 0]]))  # fmt: skip
    assert torch.equal(changed[0, 1:], changed[1, 1:])


def test_a_mixed_row_takes_both_classes_by_their_shares_smoothed_over_the_classes() -> None:
    targets, soft = torch.rand(2, 3, 5), torch.tensor([[0, 0, 0], [0.25, 0.75, 0], [0, 0, 1]])
    batch = replace(given(), labels=torch.tensor([-1, -1, 2]), soft=soft)
    changed = labelled(targets, batch, classes=3, smoothing=0.3)
    assert torch.equal(changed[:, 0], targets[:, 0])
    torch.testing.assert_close(changed[0, 1:], torch.tensor([[0.275, 0.625, 0.1, 0, 0],
                                                             [0.1, 0.1, 0.8, 0, 0]]))  # fmt: skip


@pytest.mark.parametrize("name", ["suave", "daino", "supervised"])
def test_one_class_a_row_is_the_same_loss_with_labels_and_with_shares_of_classes(
    name: str,
) -> None:
    of = recipe(name, ONE_SIZE, "seeds.mix=null", "terms={}", "method.smoothing=0.1")
    plain = batch(of)
    soft = replace(plain, soft=F.one_hot(plain.labels + 1, CLASSES + 1)[:, 1:].float())
    torch.manual_seed(0)
    one = method(of).eval()
    for key, value in one(plain).items():
        torch.testing.assert_close(one(soft)[key], value)


@pytest.mark.parametrize("name", ["suave", "daino", "supervised"])
def test_the_loss_of_a_mixed_row_is_that_of_its_classes_by_their_shares(name: str) -> None:
    """Where every row is labelled, as then the targets of all rows are known."""
    of = recipe(name, ONE_SIZE, "seeds.mix=null", "terms={}", "method.smoothing=0")
    every = with_labels(batch(of), batch(of).labels.clamp(min=0))
    torch.manual_seed(0)
    one, both = method(of).eval(), with_mixtures(every)
    assert both.soft is not None
    crops = every.crops if name != "supervised" else every.crops[:1]
    logs = [one.classify(one.backbone(crop)).log_softmax(1)[:, :CLASSES] for crop in crops]
    expected = -torch.stack([(both.soft * rows).sum(1) for rows in logs]).mean()
    torch.testing.assert_close(one(both)["loss"], expected)


@pytest.mark.parametrize("name", ["suave", "daino"])
def test_the_loss_is_one_cross_entropy_over_labelled_and_unlabelled_rows(name: str) -> None:
    one, fixed = (suave() if name == "suave" else daino()).eval(), given(name)
    known = fixed.labels >= 0
    crops = [one.classify(one.backbone(crop)) for crop in fixed.crops]  # logits
    supervised = torch.stack([
        F.cross_entropy(rows[known, :], fixed.labels[known], reduction="none") for rows in crops
    ]).mean(0)  # fmt: skip
    if isinstance(one, Suave):
        scores = torch.stack(crops)[:, ~known].detach() * one.config.temperature
        targets = one.assign(scores, torch.empty(2, 0, one.config.out))
    else:
        targets = one.sharpen(one.teach(fixed.crops), Now())[:, ~known]
    pairs = [F.cross_entropy(crops[1 - i][~known], targets[i], reduction="none") for i in (0, 1)]
    expected = torch.cat([supervised, torch.stack(pairs).mean(0)]).mean()
    one.smoothing = 0.0
    torch.testing.assert_close(one(fixed)["loss"], expected)


@pytest.mark.parametrize("name", ["suave", "daino"])
def test_a_batch_of_labelled_rows_alone_trains_on_labels_and_stays_finite(name: str) -> None:
    one, fixed = (suave() if name == "suave" else daino()).train(), given(name)
    told = one(with_labels(fixed, fixed.labels.clamp(min=0)))
    told["loss"].backward()
    one.after_step(Now())
    assert all(torch.isfinite(value).all() for value in told.values())
    assert all(torch.isfinite(value).all() for value in one.state_dict().values())


def test_sinkhorn_meets_a_given_prior_on_the_unlabelled_rows() -> None:
    one = suave("method.prior=[4, 3, 2, 1, 1, 1]", "method.iterations=200", "method.epsilon=0.5")
    fixed = given()
    unknown = fixed.labels < 0
    rows = F.normalize(torch.randn(2, len(unknown), one.config.out), dim=2)
    targets = one.targets(one.prototypes(rows), rows, fixed)[:, unknown]
    shares = torch.tensor([4, 3, 2, 1, 1, 1]) / 12
    torch.testing.assert_close(targets.mean(1), shares.expand(2, -1), atol=1e-4, rtol=0)


def filled(prior: str) -> tuple[float, Suave]:
    """The share of prototype 3 in assignments after steps on images of three classes of four."""
    one, labels = suave(f"method.prior={prior}", "method.prior_momentum=0.9"), torch.full((24,), -1)
    random = torch.Generator().manual_seed(0)
    fixed, rows = with_labels(given(), labels), torch.zeros(2, 24, one.config.out)
    scores = 0.05 * torch.randn(2, 24, CLASSES + 2, generator=random)
    scores[:, torch.arange(24), torch.arange(24) % 3] += 0.8
    for step in range(60):
        targets = one.targets(scores, rows, fixed)
        one.after_step(Now(step))
    return float(targets[0, :, 3].mean()), one


def test_a_class_that_does_not_occur_is_filled_by_a_uniform_prior_and_not_by_a_learned_one() -> (
    None
):
    (by_force, _), (learned, one) = filled("uniform"), filled("learned")
    assert by_force > 0.1  # of 1 / 6
    assert learned < 0.01
    prior = one.prior()
    assert prior is not None
    torch.testing.assert_close(prior.sum(), torch.tensor(1.0))
    torch.testing.assert_close(prior[:3], torch.full((3,), 1 / 3), atol=0.02, rtol=0)


def test_labelled_rows_change_neither_the_assignments_of_others_nor_the_queue_and_the_prior() -> (
    None
):
    one, fixed = suave("method.queue_from=0"), given()
    unknown = fixed.labels < 0
    rows = F.normalize(torch.randn(2, len(unknown), one.config.out), dim=2)
    other = torch.where(unknown[:, None], rows, -rows.flip(2))
    kept = []
    for part in (rows, other):
        for step in range(2):
            targets = one.targets(one.prototypes(part), part, replace(fixed, now=Now(step)))
            one.after_step(Now(step))
        kept.append((targets[:, unknown], one.queue and one.queue.rows.clone()))
        assert one.past(Now(2), 24).shape[1] == 2 * int(unknown.sum())
        one = suave("method.queue_from=0")
    torch.testing.assert_close(kept[0], kept[1])


def uneven(world: World, name: str) -> dict[str, Tensor]:
    """Gradients and buffers where the first rank has no label and the last few others."""
    torch.manual_seed(0)
    of = recipe(name, ONE_SIZE)
    one, fixed = method(of, world).eval(), batch(of)
    labels = fixed.labels.clamp(min=0)
    labels[:12] = -1
    given_to_all = with_labels(replace(fixed, soft=None), labels)
    if fixed.soft is not None:
        given_to_all = with_mixtures(given_to_all)
    model = wrap_ddp(one, world)  # DDP's hooks end with it
    model(part_of_batch(given_to_all, world))["loss"].backward()
    one.after_step(Now())
    kept = {n: b for n, b in one.named_buffers() if n in ("learned.value", "centre.value")}
    return {**{n: p.grad for n, p in one.named_parameters() if p.grad is not None}, **kept}


@pytest.mark.parametrize("name", ["suave", "daino"])
def test_ranks_without_labels_and_with_labels_alone_have_the_gradient_of_the_batch(
    name: str,
) -> None:
    whole = uneven(World(), name)
    assert {"learned.value", "centre.value"} & whole.keys()
    for ranks in (2, 3):
        parts = on_ranks(ranks, uneven, name)
        for key, expected in whole.items():
            torch.testing.assert_close(parts[-1][key], expected, atol=2e-6, rtol=1e-4)


def test_daino_answers_by_its_teacher_which_is_what_is_exported() -> None:
    one = daino().eval()
    with torch.no_grad():
        one.head.last.weight.neg_()  # the student alone
    features = torch.randn(3, one.trunk.dim)
    assert parts_of(one) == ["teacher.head"]
    torch.testing.assert_close(one.answer(features), -one.classify(features))


@pytest.mark.parametrize(("name", "keys", "classes", "words"), [
    ("suave", [], (), r"seeds\.labels: suave .* no class is known"),
    ("daino", [], (), r"seeds\.labels: daino .* no class is known"),
    ("suave", ["method.free=0"], ("ant",), "the only class of the seeds is ant"),
    ("suave", ["method.prior=[1, 1]"], ("ant", "bee"), r"2 shares for 4 prototypes \(2 classes"),
])  # fmt: skip
def test_what_cannot_work_is_refused_when_the_classes_are_known(
    name: str, keys: list[str], classes: tuple[str, ...], words: str
) -> None:
    of = recipe(name, *keys)
    setting = Setting(of.method, None, 0, ALONE, classes=classes)
    with pytest.raises(RecipeError, match=words):
        part_of(name, METHODS, "method")(build_backbone("conv4", image_size=16), setting)


@pytest.mark.parametrize(("key", "words"), [
    ("seeds=null", "seeds: are required by method suave"),
    ("method.prior=[1, 0]", "greater than 0"),
    ("method.prior=often", "method.prior"),
    ("train.accumulate=2", "contrasts whole batches"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_the_recipe(key: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe("suave", key)

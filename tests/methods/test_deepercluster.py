"""The factorised softmax, its degenerate cases, and what a round renews."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepclust import pretrain
from deepclust.methods.base import Setting, Targets
from deepclust.methods.deepcluster.config import Config as FlatConfig
from deepclust.methods.deepcluster.method import Method as DeepCluster
from deepclust.methods.deepercluster.config import Config
from deepclust.methods.deepercluster.method import Method as DeeperCluster
from deepclust.models import build_backbone
from deepclust.recipe.sections import ClusterSection
from deepclust.world import ALONE, World
from tests.methods.cases import SIZE, batch, recipe, share
from tests.tiny import assert_same_run, tiny_recipe

DEEPER = recipe("deepercluster")


def deeper(supers: int, k: int, rotations: int) -> DeeperCluster:
    config = Config(rotations=rotations)
    cluster = ClusterSection(k=k, supers=supers, dim=8)
    return DeeperCluster(
        build_backbone("conv4", image_size=SIZE), Setting(config, cluster, 0, ALONE)
    )


def targets(k: int, round: int = 0) -> Targets:
    assignments, centroids = np.zeros((1, 4), np.int32), np.zeros((1, k, 8), np.float32)
    return Targets(round, Path("assignments.npy"), assignments, centroids, None, None)


def test_the_probabilities_of_all_pairs_add_up_to_one() -> None:
    method = deeper(2, 6, 4).eval()
    features = method.backbone(batch(DEEPER).crops[0]).double()
    method = method.double()
    outer = F.softmax(method.super_head(features), 1)
    total = 0
    for s in range(8):
        inner = method.sub_head.logits(features, torch.full((24,), s))
        total = total + outer[:, s] * F.softmax(inner, 1).sum(1)
    torch.testing.assert_close(total, torch.ones(24).double())


def test_only_the_classifier_of_the_true_super_class_gets_a_gradient() -> None:
    method = deeper(2, 6, 4)
    one = batch(DEEPER)
    method(one)["loss"].backward()
    s, _ = method.classes(one)
    there = torch.zeros(8, dtype=torch.bool)
    there[s] = True
    moved = method.sub_head.weight.grad.flatten(1).any(1)
    assert torch.equal(moved, there)
    some = share(one, World(0, 8))
    method.zero_grad()
    method(some)["loss"].backward()
    assert method.sub_head.weight.grad.flatten(1).any(1).sum() <= 3


def test_the_four_turns_share_the_sub_cluster_and_not_the_classifier() -> None:
    method = deeper(2, 6, 4)
    four = share(batch(DEEPER), World(0, 6))
    one = replace(four, turns=torch.arange(4), pseudo_labels=torch.full((1, 4), 5))
    s, z = method.classes(one)
    assert s.tolist() == [4, 5, 6, 7]
    assert z.tolist() == [2, 2, 2, 2]


def test_one_upright_super_cluster_is_deepcluster() -> None:
    method = deeper(1, 6, 1)
    cluster = ClusterSection(k=6, dim=8)
    flat = DeepCluster(method.backbone, Setting(FlatConfig(), cluster, 0, ALONE))
    with torch.no_grad():
        flat.head.weight.copy_(method.sub_head.weight[0])
        flat.head.bias.copy_(method.sub_head.bias[0])
    one = batch(recipe("deepercluster", "method.rotations=1"))
    torch.testing.assert_close(method.eval()(one)["loss"], flat.eval()(one)["loss"])


def test_one_sub_cluster_in_each_is_rotnet() -> None:
    method = deeper(1, 1, 4).eval()
    one = batch(DEEPER)
    one = replace(one, pseudo_labels=torch.zeros_like(one.pseudo_labels))
    loss = method(one)
    plain = F.cross_entropy(method.super_head(method.backbone(one.crops[0])), one.turns)
    torch.testing.assert_close(loss["loss"], plain)
    assert loss["sub"] == 0


def test_a_round_renews_both_heads_the_same_way_each_time() -> None:
    one, other = deeper(2, 6, 4), deeper(2, 6, 4)
    before = [one.super_head.weight.clone(), one.sub_head.weight.clone()]
    renewed = one.adopt(targets(6), 0)
    assert all(rows.all() for rows in renewed.values())
    assert {"sub_head.weight", "super_head.bias"} <= renewed.keys()
    other.adopt(targets(6), 0)
    for method in (one, other):
        assert not torch.equal(method.super_head.weight, before[0])
        assert not torch.equal(method.sub_head.weight, before[1])
    assert torch.equal(one.sub_head.weight, other.sub_head.weight)
    other.adopt(targets(6, round=1), 0)
    assert not torch.equal(one.sub_head.weight, other.sub_head.weight)


def test_a_head_that_classifies_turns_alone_is_not_renewed() -> None:
    method = deeper(1, 6, 4)
    before = method.super_head.weight.clone()
    assert method.adopt(targets(6), 0).keys() == {"sub_head.weight", "sub_head.bias"}
    assert torch.equal(method.super_head.weight, before)
    assert method.renewed() == ("sub_head",)


@pytest.mark.slow
def test_with_a_single_cluster_only_the_super_loss_is_trained(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, "cluster.k=1", "method.name=deepercluster", "cluster.until=1")
    run = pretrain(recipe, tmp_path / "run")
    assert run.rounds() == [0]
    record = run.metrics("train")[-1]
    assert record["sub"] == 0
    assert record["loss"] == record["super"] > 0


@pytest.mark.slow
def test_two_levels_do_not_depend_on_which_process_clusters(shards: Path, tmp_path: Path) -> None:
    two = ("method.name=deepercluster", "cluster.supers=2", "train.ranks=2", "train.epochs=1")
    for where in ("worker", "ranks", "inline"):
        pretrain(tiny_recipe(shards, *two, f"cluster.where={where}"), tmp_path / where)
    assert_same_run(tmp_path / "worker", tmp_path / "ranks")
    assert_same_run(tmp_path / "worker", tmp_path / "inline")

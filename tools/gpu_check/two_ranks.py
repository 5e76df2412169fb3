"""The check of two ranks: labels, sub-heads after a resume, batch norms, a rank that is killed.

With one GPU two processes share it by gloo, which shows the labels only. What needs a run of two
ranks needs two GPUs, because NCCL refuses two ranks on one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from agreement import white_rows
from outcome import Outcome, Setting, judged

from deepclust import Recipe, kmeans, pretrain
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.errors import ResourceError
from deepclust.launch.start import resume
from deepclust.run.directory import Run
from deepclust.stages.build import synchronised
from deepclust.world import World
from tests.killing import family, role, wait_until_gone
from tests.tiny import final_weights, tiny_recipe, tiny_shards

ROWS, K = 4000, 50
NEAR_TIES = 2e-4  # the share of labels that may differ
PATIENCE_S = 60.0  # in which the others of a killed rank have to end
FAMILIES = ("efficientnet_b0", "mobilenetv3_small_050", "regnety_002", "resnetv2_50d",
            "densenet121", "resnet18")  # fmt: skip
STILL = ("train.lr=1e-12", "train.weight_decay=0", "cluster.every=9 epochs")  # weights stay
GUESS = "guessing device"  # what torch says where a rank's GPU is not known to NCCL


def two_ranks(setting: Setting, families: tuple[str, ...] = FAMILIES) -> Outcome:
    """Do what there are enough GPUs for; with fewer than two the whole counts as not here."""
    cards = torch.cuda.device_count() if setting.device.type == "cuda" else 2
    shards = tiny_shards(setting.folder / "shards", 600)
    found: dict[str, Any] = {
        "labels of one card differ": shared_card(setting),
        "features moved by sync_bn": moved_features(setting, families),
    }
    if cards > 1:
        found |= {
            "labels of runs differ": other_labels(setting, shards),
            "sub-heads differ by": moved_sub_heads(setting, shards),
            "seconds from a kill to the end": killed_rank(setting, shards),
            "guessed devices": guesses(setting.folder),
        }
    most = {"labels of one card differ": 0.0, "labels of runs differ": NEAR_TIES,
            "features moved by sync_bn": 1e-3, "sub-heads differ by": 1e-6,
            "seconds from a kill to the end": PATIENCE_S, "guessed devices": 0}  # fmt: skip
    text = ", ".join(f"{name} {value:.3g} ({most[name]:g})" for name, value in found.items())
    if cards > 1 or any(value > most[name] for name, value in found.items()):
        return judged(all(value <= most[name] for name, value in found.items()), text, **found)
    return Outcome("not here", f"{text}; the rest needs two GPUs", found)


def shared_card(setting: Setting) -> float:
    """The share of labels that two processes on one device give otherwise than one alone."""
    alone = kmeans(half_rows(), K, iterations=5, device=setting.device).assignments
    spawn = multiprocessing.get_context("spawn")
    words = (str(setting.folder), str(setting.device))
    both = [spawn.Process(target=cluster_half, args=(rank, *words)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    codes = [process.exitcode for process in both]
    assert codes == [0, 0], f"the two processes ended with {codes}"
    labels = [np.load(setting.folder / f"labels-{rank}.npy") for rank in range(2)]
    return float((np.concatenate(labels) != alone).mean())


def cluster_half(rank: int, folder: str, device: str) -> None:
    """Cluster a half of the rows, in one of two processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meet", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    own = np.array_split(half_rows(), 2)[rank]
    points = ShardedPoints(ArrayPoints(own, device=device), World(rank, 2, torch.device(device)))
    np.save(f"{folder}/labels-{rank}.npy", kmeans(points, K, iterations=5).assignments)
    dist.barrier()
    dist.destroy_process_group()


def half_rows() -> np.ndarray:
    """The rows that are clustered, float16."""
    return np.asarray(white_rows(ROWS, 64).half().numpy())


def moved_features(setting: Setting, families: tuple[str, ...]) -> float:
    """The largest change of a network's features by norms over all ranks, relative to them."""
    import timm  # an optional dependency

    moved = [0.0]
    for name in families:
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=0).eval().to(setting.device)
        images = torch.randn(2, 3, 64, 64).to(setting.device)
        with torch.no_grad():
            before = network(images)
            moved.append(float((synchronised(network)(images) - before).norm() / before.norm()))
    return max(moved)


def recipe_of(setting: Setting, shards: Path, ranks: int, *overrides: str) -> Recipe:
    """The smallest job on so many ranks that cluster together."""
    where = "cluster.where=" + ("inline" if ranks == 1 else "ranks")
    device = f"train.device={setting.device.type}"
    return tiny_recipe(shards, device, f"train.ranks={ranks}", where, "train.epochs=1", *overrides)


def other_labels(setting: Setting, shards: Path) -> float:
    """The share of round 0's labels in which two ranks differ from one."""
    labels = []
    for ranks in (1, 2):
        path = setting.folder / f"run-of-{ranks}"
        run = pretrain(recipe_of(setting, shards, ranks), path)
        labels.append(np.load(run.round(0) / "assignments" / "assignments.npy"))
    return float((labels[0] != labels[1]).mean())


def moved_sub_heads(setting: Setting, shards: Path) -> float:
    """The largest change of a sub-head's weight where one rank goes on with those of two.

    The rate is next to nothing, so rows that were lost or exchanged are the only large changes.
    """
    sub = ("method.name=deepercluster", "cluster.supers=2", *STILL)
    run = pretrain(recipe_of(setting, shards, 2, *sub), setting.folder / "sub-heads")
    before = sub_heads(run)
    resume(run.path, "train.ranks=1", "train.epochs=2")
    after = sub_heads(run)
    assert before.shape == after.shape, f"sub-heads {before.shape} became {after.shape}"
    return float(np.abs(before - after).max())


def sub_heads(run: Run) -> np.ndarray:
    """The sub-heads' weights in the newest checkpoint, the ranks' rows put together."""
    parts = final_weights(run.path)
    own = [name for name in sorted(parts) if name.endswith("/sub_head.weight")]
    return np.concatenate([parts[name] for name in own if name.startswith("owned")], axis=1)


def killed_rank(setting: Setting, shards: Path) -> float:
    """The seconds from kill -9 of rank 1 until the run and its processes have ended."""
    struck: dict[str, Any] = {}

    def show(record: dict[str, Any]) -> None:
        if not struck and record.get("progress") and record.get("step", 0) >= 3:
            struck["all"] = family(os.getpid())[1:]
            (rank,) = [pid for pid in struck["all"] if role(pid, 0) == "rank 1"]
            struck["at"] = time.monotonic()
            os.kill(rank, signal.SIGKILL)

    recipe = recipe_of(setting, shards, 2, "train.epochs=9", "train.restarts=0")
    try:
        pretrain(recipe, setting.folder / "killed", show)
    except ResourceError:
        ranks = [pid for pid in struck["all"] if role(pid, 0).startswith("rank")]
        wait_until_gone(ranks, PATIENCE_S)
        return time.monotonic() - float(struck["at"])
    raise AssertionError("the run went on without a rank")


def guesses(folder: Path) -> int:
    """How many logs of the ranks say that NCCL guessed a device."""
    logs = [file.read_text(errors="replace") for file in folder.glob("*/logs/*.log")]
    assert logs, "the ranks have left no logs"
    return sum(GUESS in text for text in logs)

"""The check of devices: masks lead ranks to their card, and a worker of no GPU leaves all alone.

What starts a rank (this machine, Ray, srun) is asked which card its torch takes under a mask. Ray
and srun are asked where they are installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import smi
from outcome import Outcome, Setting, judged

from deepclust import pretrain
from tests.killing import family, role
from tests.tiny import tiny_recipe, tiny_shards

ROOT = Path(__file__).resolve().parents[2]
OWN_CARD = """
import sys
from pathlib import Path
import torch
from deepclust.launch.devices import training_device
from deepclust.launch.role import Role
from tests.tiny import tiny_recipe
rank = int(sys.argv[1])
device = training_device(tiny_recipe(Path("."), "train.device=cuda"), Role(rank, rank + 1))
print(torch.cuda.get_device_properties(device).uuid)
"""
BY_RAY = """
import sys
import ray, torch
from cluster_jobs.ray.actor import own_gpu
from cluster_jobs.ray.transport import UNMASKED
from deepclust.launch.visible_gpus import number_of

@ray.remote(num_gpus=1, runtime_env={"env_vars": UNMASKED})
class Actor:
    def card(self):
        place, problem = own_gpu(tuple(map(str, ray.get_gpu_ids())))
        return problem or str(torch.cuda.get_device_properties(number_of(place)).uuid)

ray.init("local", num_gpus=torch.cuda.device_count(), include_dashboard=False)
actors = [Actor.remote() for _ in range(int(sys.argv[1]) + 1)]
print(*sorted(ray.get([actor.card.remote() for actor in actors])))
"""
Ask = Callable[[str, int], str]  # a mask and a rank -> what the process says of its card


def devices(setting: Setting) -> Outcome:
    """Try masks on everything that starts ranks here, then a cluster worker with no GPU."""
    uuids = [one.strip() for one in smi("uuid").split("\n")]
    ways: dict[str, Ask] = {"local": local}
    ways |= {"srun": by_srun} if shutil.which("srun") else {}
    wrong = [one for name, ask in ways.items() for one in wrong_cards(name, ask, uuids)]
    has_ray = importlib.util.find_spec("ray") is not None
    wrong += wrong_by_ray(uuids) if has_ray else []
    wrong += worker_on_a_card(setting, compute_pids)
    asked = ", ".join([*ways, *(["ray"] if has_ray else [])])
    text = f"{asked}: {len(wrong)} wrong: {'; '.join(wrong)[:300]}" if wrong else "all as masked"
    return judged(not wrong, text if wrong else f"{asked}: {text}", asked=asked, wrong=wrong)


def masks(uuids: list[str]) -> list[tuple[str, list[str]]]:
    """Masks, and the cards that their ranks must take: the last one, its name, two of them."""
    last = len(uuids) - 1
    given = [(str(last), [uuids[last]]), (uuids[last], [uuids[last]])]
    if last:  # every second card of four, or two the other way round
        pair = (1, 3) if last >= 3 else (1, 0)
        given.append((",".join(map(str, pair)), [uuids[one] for one in pair]))
    return given


def wrong_cards(name: str, ask: Ask, uuids: list[str]) -> list[str]:
    """The ranks that take another card than their mask leads to, in words."""
    wrong = []
    for mask, wanted in masks(uuids):
        for rank, uuid in enumerate(wanted):
            taken = ask(mask, rank)
            if plain(taken) != plain(uuid):
                wrong.append(f"{name}, mask {mask}, rank {rank}: {taken}")
    return wrong


def wrong_by_ray(uuids: list[str]) -> list[str]:
    """The same for Ray, which may give its ranks the cards of a mask in any order."""
    wrong = []
    for mask, wanted in masks(uuids):
        taken = said(BY_RAY, mask, len(wanted) - 1).split()
        if sorted(map(plain, taken)) != sorted(map(plain, wanted)):
            wrong.append(f"ray, mask {mask}: {' '.join(taken)}")
    return wrong


def local(mask: str, rank: int) -> str:
    """What a rank of this machine says."""
    return said(OWN_CARD, mask, rank)


def by_srun(mask: str, rank: int) -> str:
    """What a task of Slurm says that sees what the mask leaves."""
    return said(OWN_CARD, mask, rank, "srun", "--ntasks=1", "--export=ALL")


def said(script: str, mask: str, number: int, *before: str) -> str:
    """The last line that a script prints under a mask, or the end of its error."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": mask, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*before, sys.executable, "-c", script, str(number)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else done.stderr.strip()[-200:]


def plain(uuid: str) -> str:
    """A card's name without the prefix that nvidia-smi has and torch has not."""
    return uuid.strip().removeprefix("GPU-").lower()


def compute_pids() -> set[int]:
    """The processes that have a context on any card."""
    words = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return {int(word) for word in done.stdout.split() if word.isdecimal()}


def worker_on_a_card(setting: Setting, pids: Callable[[], set[int]]) -> list[str]:
    """Train beside a cluster worker of no GPU, and look which of the processes is on a card."""
    seen: dict[str, bool] = {}

    def show(record: dict[str, Any]) -> None:
        if record.get("progress") and record.get("step"):
            on_cards = pids()
            seen.update({role(pid, 0): pid in on_cards for pid in family(os.getpid())[1:]})

    words = ("cluster.where=worker", "cluster.gpus=0", "train.epochs=2")
    recipe = tiny_recipe(tiny_shards(setting.folder / "shards"), *words)
    pretrain(recipe.replace(f"train.device={setting.device.type}"), setting.folder / "run", show)
    if "cluster worker" not in seen:
        return ["no cluster worker was seen"]
    if not seen.get("rank 0"):  # in a container nvidia-smi may give the host's numbers
        return ["nvidia-smi does not list rank 0, so it says nothing of the cluster worker"]
    return ["the cluster worker has a context on a card"] if seen["cluster worker"] else []

"""The `slurm` section of a recipe: what a run asks of a Slurm cluster."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from deepclust.recipe import Recipe, checked
from deepclust.recipe.sections import Section


def one_line(text: str) -> str:
    """Return the text if a line of an sbatch script can hold it, else raise `ValueError`.

    The syntax of #SBATCH lines has no escape for the end of a line.
    """
    if not text or not text.isprintable() or "\\" in text:
        raise ValueError(f"{text!r} is empty or has a character that no sbatch line can hold")
    return text


def _as_text(value: object) -> object:
    return str(value) if type(value) is int else value


Line = Annotated[str, AfterValidator(one_line)]
TIMES = ((r"(\d+)m", 1), (r"(\d+)h", 60), (r"(\d+)d", 24 * 60))
CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))(?::(\d\d))?")
SET_BY_US = {
    "array", "chdir", "error", "job-name", "ntasks", "ntasks-per-node", "open-mode", "output",
    "requeue", "no-requeue",
}  # fmt: skip


def minutes(text: str) -> int:
    """Return a time limit (90m, 24h, 2d, D-HH:MM[:SS], HH:MM:SS) in minutes, rounded up."""
    for pattern, factor in TIMES:
        if match := re.fullmatch(pattern, text):
            return int(match[1]) * factor
    match = CLOCK.fullmatch(text)
    if match is None or (match[1] is None and match[4] is None):
        raise ValueError(f"{text!r} is not a time limit; write 90m, 24h, 2d or 1-12:00:00")
    days, hours, rest, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + rest + (seconds > 0)


class SlurmSpec(Section):
    """A run on Slurm: what it asks for, and how its processes are started."""

    partition: Line | None = None
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    gpus: int | None = Field(
        None, ge=1, description="of all nodes, where they have different numbers; launcher ray"
    )
    gpu_type: Line | None = Field(None, description="as the cluster names it, e.g. a100")
    cpus_per_node: int | None = Field(None, ge=1, description="default: what the processes need")
    mem: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        None, pattern=r"^\d+[KMGT]?$", description="of a node, e.g. 900G; 0: all of it"
    )
    time: str | None = Field(None, description="limit, e.g. 90m, 24h, 2d, 1-12:00:00")
    qos: Line | None = None
    account: Line | None = None
    constraint: Line | None = None
    exclusive: bool = False
    sbatch: dict[str, Line | int | bool] = Field(
        {}, description="more options of sbatch, e.g. {reservation: spring, mail-type: END}"
    )
    setup: list[Line] = Field([], description="shell lines before the start, e.g. module load")
    container_image: Line | None = Field(None, description="for srun --container-image (pyxis)")
    container_mounts: list[Line] = []
    launcher: Literal["ray", "srun"] = Field(
        "ray", description="what starts the ranks: a Ray that the job brings up, or srun alone"
    )
    ranks: int | None = Field(None, ge=1, description="default: one for each GPU, or train.ranks")
    cpus_per_rank: int | None = Field(None, ge=1, description="default: data.workers + 1, or more")
    worker_cpus: int = Field(1, ge=1, description="CPUs of the cluster worker")
    signal: int = Field(120, ge=1, description="seconds between USR2 and the time limit")

    requeues: int = Field(
        1000, ge=0, description="times that the job may be requeued, by us or by Slurm"
    )
    start: float = Field(300.0, gt=0, description="seconds for all nodes to come up")
    snapshot: bool = Field(
        False, description="run a copy of deepclust and cluster_jobs as they were at submit"
    )
    python: Line | None = Field(None, description="Python on the nodes; default: that of submit")

    @property
    def stop(self) -> float:
        """The seconds for all ranks to stop: half of those between signal and end, or 30."""
        return max(30.0, self.signal / 2)

    @field_validator("time", mode="before")
    @classmethod
    def _written_as_text(cls, value: object) -> object:
        if isinstance(value, int):  # YAML reads 24:00:00 as a number of base 60
            raise ValueError("write 90m, 24h, 2d or 1-12:00:00: a plain number has no unit")
        return value

    @field_validator("time")
    @classmethod
    def _a_time(cls, value: str | None) -> str | None:
        if value is not None:
            minutes(value)
        return value

    @model_validator(mode="after")
    def _time_to_stop(self) -> Self:
        if self.time is not None and minutes(self.time) * 60 <= self.signal:
            raise ValueError(
                f"time={self.time} is not more than signal={self.signal} s, the time to stop"
            )
        return self

    @model_validator(mode="after")
    def _a_python_of_the_container(self) -> Self:
        if self.container_image and self.python is None:
            raise ValueError("container_image needs python, the path of the image's")
        return self

    @model_validator(mode="after")
    def _one_count_of_gpus(self) -> Self:
        if self.gpus is None:
            return self
        if self.gpus_per_node or self.launcher != "ray" or self.cpus_per_node is None:
            raise ValueError(
                f"gpus={self.gpus} of all nodes needs cpus_per_node, no gpus_per_node, and "
                "launcher=ray: srun has the same number of tasks on every node"
            )
        return self

    @field_validator("sbatch")
    @classmethod
    def _options(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        given = {name.replace("-", "_"): name for name in value}
        known = set(cls.model_fields) | {name.replace("-", "_") for name in SET_BY_US}
        for option, name in given.items():
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise ValueError(
                    f"{name!r} is not a long option of sbatch; write it without leading dashes"
                )
            if option in known:
                is_ours = option not in cls.model_fields
                raise ValueError(
                    f"{name}: " + ("deepclust sets it" if is_ours else f"use slurm.{option}")
                )
        return value


def slurm_spec(recipe: Recipe) -> SlurmSpec:
    """Return the `slurm` section, checked.

    A `RecipeError` names every key that is wrong.
    """
    return checked(SlurmSpec, recipe.slurm, "recipe", within="slurm.")

"""What a recipe says about where it runs: `ray.*` and `slurm.*`; `deepclust` looks at neither."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from deepclust.errors import RecipeError
from deepclust.recipe import Recipe, checked
from deepclust.recipe.sections import Section


class RankRange(Section):
    """How few ranks a gang may begin with, and how many it wants."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class RaySpec(Section):
    """A run on Ray: which cluster, what a rank gets, and how much is forgiven."""

    address: str | None = Field(
        None, description="of a standing cluster, http://HOST:8265 or HOST:6379; none: our own here"
    )
    python: str | None = Field(None, description="Python on the cluster; default: that of submit")
    env: dict[str, str] = Field({}, description="environment of the controller and of every rank")
    ranks: RankRange | None = Field(
        None, description="{min: 2, max: 8}: fewer ranks when nodes are lost, more when they return"
    )
    cpus: int = Field(1, ge=1, description="CPUs of a rank, its reader processes included")
    worker_cpus: int = Field(1, ge=1, description="CPUs of the cluster worker")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    wait: float = Field(900.0, ge=0, description="seconds to wait for a cluster that is too small")
    settle: float = Field(15.0, ge=0, description="seconds before fewer ranks are good enough")
    start: float = Field(300.0, gt=0, description="seconds for all processes to come up")
    hang: float | None = Field(
        None,
        gt=0,
        description="seconds without a sign of life that are a hang; default: train.hang",
    )
    stop: float = Field(
        120.0,
        gt=0,
        description="seconds for all ranks to stop at a step; then the last commit counts",
    )
    worker_resources: dict[str, float] = Field(
        {}, description="of the cluster worker's node, as it was given to `ray start --resources`"
    )
    max_failures: int = Field(10, ge=0, description="deaths and hangs before the run gives up")
    max_preemptions: int = Field(100, ge=0, description="nodes taken away before it gives up")


def ray_spec(recipe: Recipe) -> RaySpec:
    """The `ray` section, checked; a `RecipeError` names every key that is wrong."""
    spec = checked(RaySpec, recipe.ray, "recipe", within="ray.")
    if spec.ranks is not None and not sizes(recipe, spec):
        raise RecipeError(
            f"ray.ranks: no number from {spec.ranks.min} to {spec.ranks.max} divides train.batch="
            f"{recipe.train.batch}"
        )
    return spec


def sizes(recipe: Recipe, spec: RaySpec) -> list[int]:
    """The numbers of ranks that the gang may have, most first; each divides the batch."""
    if spec.ranks is None:
        return [recipe.train.ranks]
    wanted = range(spec.ranks.max, spec.ranks.min - 1, -1)
    parts = recipe.train.accumulate
    return [size for size in wanted if recipe.train.batch % (size * parts) == 0]


def one_line(text: str) -> str:
    """The text, if a line of an sbatch script can hold it; that syntax has no way to end a line."""
    if not text or not text.isprintable() or "\\" in text:
        raise ValueError(f"{text!r} is empty or has a character that no sbatch line can hold")
    return text


def _as_text(value: object) -> object:
    return str(value) if type(value) is int else value


Line = Annotated[str, AfterValidator(one_line)]
TIMES = ((r"(\d+)m", 1), (r"(\d+)h", 60), (r"(\d+)d", 24 * 60))
CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))(?::(\d\d))?")
OURS = {
    "array", "chdir", "error", "job-name", "ntasks", "ntasks-per-node", "open-mode", "output",
    "requeue", "no-requeue",
}  # fmt: skip


def minutes(text: str) -> int:
    """A time limit in whole minutes, rounded up: 90m, 24h, 2d, D-HH:MM[:SS] or HH:MM:SS."""
    for pattern, factor in TIMES:
        if match := re.fullmatch(pattern, text):
            return int(match[1]) * factor
    match = CLOCK.fullmatch(text)
    if match is None or (match[1] is None and match[4] is None):
        raise ValueError(f"{text!r} is no time limit; write 90m, 24h, 2d or 1-12:00:00")
    days, hours, rest, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + rest + (seconds > 0)


class SlurmSpec(Section):
    """A run on Slurm: what it asks for, and how its processes are started there."""

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
        "ray", description="who starts the ranks: a Ray of the job's own, or srun alone"
    )
    ranks: int | None = Field(None, ge=1, description="default: a rank a GPU, or train.ranks")
    cpus_per_rank: int | None = Field(None, ge=1, description="default: data.workers + 1, or more")
    worker_cpus: int = Field(1, ge=1, description="CPUs of the cluster worker")
    signal: int = Field(120, ge=1, description="seconds before the limit that USR2 comes")

    requeues: int = Field(
        1000, ge=0, description="times that the job is queued again, by us or by Slurm"
    )
    start: float = Field(300.0, gt=0, description="seconds for all nodes to come up")
    snapshot: bool = Field(
        False, description="run a copy of deepclust and cluster_jobs as they were at submit"
    )
    python: Line | None = Field(None, description="Python on the nodes; default: that of submit")

    @property
    def stop(self) -> float:
        """Seconds for all ranks to stop: half of those between the signal and the end, or 30."""
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
                f"time={self.time} is no more than signal={self.signal} s, in which the run stops"
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
                "launcher=ray: srun has as many tasks on every node"
            )
        return self

    @field_validator("sbatch")
    @classmethod
    def _options(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        given = {name.replace("-", "_"): name for name in value}
        known = set(cls.model_fields) | {name.replace("-", "_") for name in OURS}
        for option, name in given.items():
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise ValueError(f"{name!r} is no long option of sbatch; write it without dashes")
            if option in known:
                place = f"slurm.{option}" if option in cls.model_fields else "nothing: we set it"
                raise ValueError(f"{name}: use {place}")
        return value


def slurm_spec(recipe: Recipe) -> SlurmSpec:
    """The `slurm` section, checked; a `RecipeError` names every key that is wrong."""
    return checked(SlurmSpec, recipe.slurm, "recipe", within="slurm.")

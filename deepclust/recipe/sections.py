"""The sections of a recipe: every key that decides what a run computes, with type and meaning.

A component is given its own section and nothing else. Nothing here imports torch: a recipe is
read, checked and printed before it is.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from deepclust.recipe.declare import Cost, Crops, Pass, Refresh

if TYPE_CHECKING:
    from deepclust.recipe.recipe import Recipe


@dataclass(frozen=True)
class Cadence:
    """How often something happens: every `count` epochs or steps."""

    count: int
    unit: Literal["epoch", "step", "round"]  # round: so often in all, ever more seldom


def parse_cadence(text: str) -> Cadence:
    """`"1 epoch"`, `"3 epochs"`, `"200 steps"`, `"100 rounds"` as a Cadence."""
    number, _, word = text.strip().partition(" ")
    for unit in ("epoch", "step", "round"):
        if number.isdigit() and int(number) > 0 and word in (unit, f"{unit}s"):
            return Cadence(int(number), unit)
    raise ValueError(f'{text!r} is not a cadence; write "1 epoch", "3 epochs" or "200 steps"')


def _checked_cadence(text: str) -> str:
    parse_cadence(text)
    return text


def _checked_weight(source: object, weight: object) -> float:
    try:
        value = float(weight) if isinstance(weight, int | float | str) else 0.0
    except ValueError:
        value = 0.0
    if 0 < value < float("inf"):
        return value
    raise ValueError(f"the weight of {str(source)!r} is {weight!r}: give a positive number")


def _without_rounds(text: str) -> str:
    if parse_cadence(text).unit == "round":
        raise ValueError(f'{text!r} is for cluster.every; write "1 epoch" or "200 steps"')
    return text


CadenceText = Annotated[str, AfterValidator(_checked_cadence)]
CheckpointText = Annotated[str, AfterValidator(_without_rounds)]


class Section(BaseModel):
    """A part of the recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


_WEIGHTED = re.compile(r"(.+?):\s*([0-9.]+(?:e[+-]?[0-9]+)?)")

Readers = Annotated[int, Field(ge=0)] | Literal["auto"]
READERS, MOST_READERS = 4, 8  # where the CPUs are not known; of `auto`
Chance = Annotated[float, Field(ge=0, le=1)]


class LocalCrops(Section):
    """Small crops beside the full-size ones, for methods that use them (multi-crop)."""

    count: int = Field(ge=1)
    size: int = Field(ge=8, description="side of the square, pixels")
    scale: tuple[float, float] = Field((0.05, 0.25), description="area of a crop")
    blur: Chance | None = Field(None, description="default: that of the last full-size crop")
    solarise: Chance | None = Field(None, description="default: that of the last full-size crop")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale goes from a small positive number to a larger one")
        return self


class Data(Section):
    """Which images, and how they are cropped and coloured."""

    shards: str | tuple[str, ...] | dict[str, float] = Field(
        description="folder of tar shards or images, list (.csv), pattern ({0..9}, *), URL "
        "(s3://), a list of these, or their weights {a: 2, b: 1}"
    )
    image: str = Field(
        "auto", min_length=1, description='the image member: auto, or a field such as "input.jpg"'
    )
    labels: str = Field(
        "auto",
        min_length=1,
        description="auto: integer in .cls or .json; none; folder: that in the tar; or a field "
        'such as "cls", "txt" or "json.KEY", whose text names the class',
    )
    index: str | None = Field(None, description="where the index lies, if not beside the shards")
    size: int = Field(224, ge=8, description="side of the square that the backbone sees, pixels")
    resize: int | None = Field(None, ge=8, description="short side before the centre crop, pixels")
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="area of a training crop")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="its width / height")
    flip: float = Field(0.5, ge=0, le=1, description="chance of a horizontal flip")
    jitter: tuple[float, float, float, float] = Field(
        (0.0, 0.0, 0.0, 0.0), description="brightness, contrast, saturation, hue of ColorJitter"
    )
    jitter_p: float = Field(0.8, ge=0, le=1, description="chance that colours are jittered")
    grey: float = Field(0.0, ge=0, le=1, description="chance of a grey image")
    blur: Chance | tuple[Chance, ...] = Field(
        0.0, description="chance of a Gaussian blur; a list has one for each full-size crop"
    )
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="its width, pixels")
    solarise: Chance | tuple[Chance, ...] = Field(
        0.0, description="chance of a solarised crop; a list has one for each full-size crop"
    )
    local: LocalCrops | None = Field(None, description="small crops beside the full-size ones")
    colour_on: Literal["auto", "workers", "device"] = Field(
        "auto", description="where colours are computed; auto: device if a GPU"
    )
    crop_on: Literal["workers", "device"] = Field(
        "workers", description="where crops are made, with the same pixels; colours then follow"
    )
    decode: Literal["cpu", "reduced", "gpu"] = Field(
        "cpu",
        description="reduced: JPEGs of a megapixel or more at 1/4 or 1/8, as their crops "
        "allow; gpu: the ranks' GPUs decode plain JPEGs. Both have other pixels than cpu, so a run "
        "keeps what it began with",
    )
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    workers: Readers = Field(
        4,
        description="reader processes per rank; 0 = in the rank itself; auto: half of the rank's "
        "CPUs, at most 8, decided and recorded at the start",
    )
    read: Literal["auto", "offset", "block"] = "auto"
    scratch: str | None = Field(None, description="node-local folder for block reading")
    stage: str | None = Field(None, description="node-local folder all shards are copied to first")
    extract_batch: int = Field(256, ge=1, description="images per forward pass of extraction")
    max_pixels: int = Field(178_956_970, ge=1, description="larger images are not decoded")
    max_bad: float = Field(0.01, ge=0, le=1, description="largest share of unreadable images")

    def readers(self, cpus: int | None = None) -> int:
        """Return the reader processes of a rank of so many CPUs (None: not known, as 4 readers)."""
        if self.workers != "auto":
            return self.workers
        return READERS if cpus is None else min(cpus // 2, MOST_READERS)

    @field_validator("shards", mode="before")
    @classmethod
    def _list_as_text(cls, value: object) -> object:
        """Read "[a, b]" and "{a: 2, b: 1}", as overrides give them, as paths without quotes."""
        if isinstance(value, dict):
            return {source: _checked_weight(source, weight) for source, weight in value.items()}
        if not isinstance(value, str) or Path(value).exists():
            return value
        parts = [part.strip() for part in value[1:-1].split(",") if part.strip()]
        if value.startswith("[") and value.endswith("]"):
            return tuple(parts)
        # braces of a pattern have no weight after a colon
        pairs = [_WEIGHTED.fullmatch(part) for part in parts]
        if value.startswith("{") and value.endswith("}") and parts and all(pairs):
            named = ((pair[1].strip("'\""), pair[2]) for pair in pairs if pair)
            return {source: _checked_weight(source, weight) for source, weight in named}
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError("jitter is four numbers from 0, the last (hue) at most 0.5")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} goes from a small positive number to a larger one")
        if self.short_side < self.size:
            raise ValueError(f"resize {self.short_side} is smaller than the crop, size {self.size}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.crops_on_device and self.colour_on == "workers":
            key = "decode=gpu" if self.decode == "gpu" else "crop_on=device"
            raise ValueError(f"{key} makes crops after the workers: leave colour_on=auto")
        return self

    @property
    def crops_on_device(self) -> bool:
        """Whether crops are made after the workers, where the backbone is."""
        return self.crop_on == "device" or self.decode == "gpu"

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights of the sources, if they have some."""
        return tuple(self.shards.values()) if isinstance(self.shards, dict) else None

    @property
    def short_side(self) -> int:
        """`resize`, or the usual 256 for 224 in proportion."""
        return self.resize if self.resize is not None else round(self.size * 256 / 224)


class BackboneSection(Section):
    """The network that turns images into features.

    `deepclust.models.BACKBONES` lists the names.
    """

    name: str
    sobel: bool = Field(False, description="see two Sobel gradients instead of colour")


class MethodSection(Section, ABC):
    """What a method declares, the base of `Config` in its `config.py`."""

    name: str = Field(description="a method of the table, or an importable module: a.b.c")

    labels: ClassVar[Literal["unused", "optional", "required"]] = "unused"
    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "nothing"  # of `classify`
    mixes: ClassVar[bool] = False  # whether targets may be a mixture of two classes (seeds.mix)
    whole_batch: ClassVar[bool] = False  # the loss compares all samples: no train.accumulate
    least: ClassVar[int] = 1  # images in a rank's part: 2 where each crop is normed alone
    trunk: ClassVar[str] = "backbone"  # the module that is clustered, exported and evaluated
    full_crops: ClassVar[int] = 1  # of an image, at data.size
    local_crops: ClassVar[bool] = False  # whether it takes the small ones of data.local too

    @property
    def round(self) -> Refresh | None:
        """How a round is made, or None for a method that trains without a clustering."""
        return None

    @property
    def mode(self) -> str:
        """How an epoch's plan draws: `exact` or `paper` from the clusters, or `all` samples."""
        return "exact"

    def crops(self, data: Data) -> tuple[Crops, ...]:
        """Return the kinds of crops of every image, as `full_crops` and `local_crops` say."""
        kinds = [Crops(self.full_crops, data.size, data.crop_scale)]
        if self.local_crops and data.local is not None:
            kinds.append(Crops(data.local.count, data.local.size, data.local.scale))
        return tuple(kinds)

    @abstractmethod
    def chance_loss(self, recipe: Recipe) -> float:
        """Return the loss of a network that has learnt nothing."""

    def guess(self, recipe: Recipe, classes: int) -> float:
        """Return the loss of a guess in a run, whose labels have so many classes."""
        return self.chance_loss(recipe)

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return what a step and the state take, for features of this width.

        By default every crop is trained on, and no state is kept.
        """
        crops = self.crops(recipe.data)
        return Cost(tuple(Pass("backbone", kind.count, kind.size) for kind in crops))

    def misfit(self, recipe: Recipe) -> str | None:
        """Return what the method cannot do with other sections of the recipe, if anything."""
        return None


class ClusteringMethodSection(MethodSection):
    """What methods share that train on a clustering."""

    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "clusters"

    sampling: Literal["exact", "paper"] = Field("exact", description="uniform cluster sampling")

    @property
    def round(self) -> Refresh:
        """One level of k-means on whitened features, after which the head is drawn again."""
        return Refresh(resets=True)

    @property
    def mode(self) -> str:
        """The draw that the recipe chooses."""
        return self.sampling

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return the default, and a linear classifier for each head: float32, with its bias."""
        per_cluster = 4 * (width + 1) * self.round.heads
        return replace(super().cost(recipe, width), per_cluster=per_cluster)


class TermSection(Section):
    """A weighted regulariser beside the loss.

    The `Config` of a term may add keys.
    """

    uses_labels: ClassVar[bool] = False
    works_on: ClassVar[Literal["features", "logits"]] = "features"  # logits: what `classify` gives

    weight: float = Field(description="factor of the term in the loss")
    ramp: float = Field(0.0, ge=0, description="epochs in which the weight grows from 0, linearly")

    def cost(self, recipe: Recipe, width: int) -> Cost:
        """Return what the term takes beside the method, for features of this width: nothing."""
        return Cost(())


class ClusterSection(Section):
    """Whitening and k-means."""

    k: int = Field(ge=1, description="number of clusters, of all super-clusters together")
    supers: int = Field(1, ge=1, description="super-clusters, for two-level k-means; divides k")
    dim: int = Field(256, ge=1, description="dimensions kept by the whitening")
    iterations: int = Field(20, ge=1)
    every: CadenceText = Field(
        "1 epoch",
        description='"n epochs" or "n steps" between rounds, or "n rounds" in all, of which round '
        "i begins at the share (i / n)^2 of the run",
    )
    until: int | None = Field(None, ge=1, description="no new round from this epoch on")
    final: bool = Field(
        True, description="a last round with the weights that are exported, which nothing trains on"
    )
    init: Literal["random", "k-means++", "two-level"] = "random"
    empty: Literal["split", "relocate"] = "split"
    min_size: int = Field(1, ge=1, description="members that every cluster ends with")
    backend: Literal["auto", "torch", "faiss"] = "auto"
    where: Literal["auto", "inline", "worker", "ranks"] = Field(
        "auto",
        description="auto: inline at one rank, else the process of the cluster worker, but ranks "
        "where a new run on this machine leaves it no GPU; ranks: all ranks together, each with "
        "its part of the rows",
    )
    raw: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description="raw rows between extraction and projection; memory: of the rank's device, as "
        "far as they fit, and a kill costs the pass again; auto: memory on a GPU, else disk",
    )
    overlap: bool = Field(False, description="k-means while the ranks train; used one round later")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="of k-means")
    gpus: int = Field(
        1, ge=0, le=1, description="GPUs of the cluster worker where ranks have GPUs; 0: CPU"
    )
    max_share: float = Field(0.9, gt=0, le=1, description="a larger cluster is a collapse")

    @field_validator("where", mode="before")
    @classmethod
    def _old_name(cls, value: object) -> object:
        return "ranks" if value == "gang" else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k % self.supers:
            raise ValueError(f"supers={self.supers} must divide k={self.k}")
        if self.overlap and self.where in ("inline", "ranks"):
            raise ValueError("overlap needs the cluster worker, a separate process: set where=auto")
        return self


SHARDS = "shards"  # where labels come from: the shards themselves
PLACES = ("ray", "slurm")  # sections on where a run runs, which change nothing it computes
BESIDE = ("notify", "track")  # nor do these, on what happens beside it


class MixSection(Section):
    """Labelled images of a batch mixed in pairs, and their classes with them.

    The keys have the meaning of timm's Mixup. A weight is drawn for each image.
    """

    mixup: float = Field(
        0.0, ge=0, description="weights of sums of two images are Beta(mixup, mixup); 0: no sums"
    )
    cutmix: float = Field(
        0.0, ge=0, description="areas of a box of the other image are Beta(cutmix, cutmix); 0: none"
    )
    chance: Chance = Field(1.0, description="of a labelled image to be mixed")
    switch: Chance = Field(0.5, description="share of cutmix, where both are on")

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        if self.mixup == self.cutmix == 0:
            raise ValueError("set mixup or cutmix, for example mixup=1, or leave mix out (null)")
        return self


class SeedsSection(Section):
    """A few labels, whose classes' prototypes are the first centroids and stay where they are."""

    labels: str = Field(description='"shards" (.cls, .json) or a table: Parquet or CSV, key, class')
    per_class: int | None = Field(
        None, ge=1, description="labels used of each class, drawn by the seed; the rest is held out"
    )
    prototypes: int = Field(1, ge=1, description="centroids of each class")
    momentum: float = Field(0.0, ge=0, lt=1, description="share of a prototype's last place kept")
    refine: float = Field(
        0.0, ge=0, description="labels that the unlabelled rows around a prototype count as in it"
    )
    pin_from: int = Field(
        0, ge=0, description="the first round that is seeded: before, features may be too raw"
    )
    release_after: int | None = Field(
        None, ge=0, description="the last round that pins them; later rounds only start from them"
    )
    force: bool = Field(False, description="labelled samples take their class's cluster")
    share: float = Field(
        0.0, ge=0, le=1, description="share of a batch drawn from labelled samples; implies force"
    )
    mix: MixSection | None = Field(
        None, description="mixup and cutmix of labelled images: keys mixup, cutmix, chance, switch"
    )
    crop_scale: tuple[float, float] | None = Field(
        None, description="area of full-size crops of labelled images; default: data.crop_scale"
    )
    colour: Chance = Field(
        1.0, description="factor on all chances of a change of colour, for labelled images"
    )
    held_out: str | None = Field(
        None, description="labels for evaluation, like `labels`; default: the shards', if any"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError("crop_scale goes from a small positive number to a larger one")
        return self

    @property
    def lighter(self) -> bool:
        """Whether labelled images have crops or colours of their own."""
        return self.crop_scale is not None or self.colour < 1

    @property
    def forces(self) -> bool:
        """Whether labelled samples are in their class's cluster, whatever k-means says."""
        return self.force or self.share > 0


class TrainSection(Section):
    """The optimisation."""

    epochs: int = Field(ge=1)
    batch: int = Field(256, ge=1, description="samples per optimizer step, over all ranks")
    ranks: int = Field(1, ge=1)
    accumulate: int = Field(1, ge=1, description="parts in which a rank's share is computed")
    optimizer: Literal["sgd", "lars", "adamw"] = Field(
        "sgd", description="of the body; heads take SGD, or AdamW if the body does"
    )
    lr: float = Field(0.05, gt=0)
    lr_end: float = Field(0.0, ge=0, description="the rate at the end of a cosine schedule")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW's two moments")
    weight_decay: float = Field(1e-5, ge=0)
    weight_decay_end: float | None = Field(
        None, ge=0, description="weight decay at the end, by a cosine; default: constant"
    )
    decay: Literal["auto", "all", "matrices"] = Field(
        "auto",
        description="what weight decay applies to; matrices: neither biases nor norms; auto: all "
        "for sgd, matrices for lars and adamw",
    )
    clip: float | None = Field(None, gt=0, description="largest norm of a step's gradient")
    clip_by: Literal["norm", "tensor"] = Field(
        "norm", description="norm: the whole gradient's; tensor: each parameter's"
    )
    head_lr: float | None = Field(None, gt=0, description="the head's, constant; default: lr")
    head_momentum: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["constant", "step", "cosine"] = "constant"
    steps_at: tuple[float, ...] = Field((), description="epochs at which `step` lowers the rate")
    step_factor: float = Field(0.1, gt=0, le=1)
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    average_from: float | None = Field(
        None,
        ge=0,
        description="epoch from which on weights are averaged, those of every step alike (SWA); "
        "the average is exported and evaluated; default: the last weights are",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="auto: bf16 on a GPU that has it (compute capability 8.0), else fp32; fp32 "
        "convolutions use TF32 on a GPU, products do not",
    )
    compile: bool = False
    sync_bn: Literal["auto", "on", "off"] = Field(
        "off", description="batch statistics of the whole global batch; auto: on several GPUs"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; recorded at start")
    checkpoint: CheckpointText = Field(
        "1 epoch", description='"n epochs" or "n steps" between checkpoints'
    )
    evaluate: CheckpointText | None = Field(
        None,
        description='"n epochs" or "n steps" between scores of kNN on labelled images; the best '
        "checkpoint by them is kept in best/; default: none",
    )
    evaluate_data: str | None = Field(
        None,
        description="labelled shards or images for it; default: a fifth of the labelled images of "
        "data.shards, which the other four fifths are the neighbours of",
    )
    log: int = Field(20, ge=1, description="steps between two lines of metrics")
    timeout: float = Field(1800.0, gt=0, description="seconds a collective may wait for a rank")
    hang: float = Field(600.0, gt=0, description="seconds without a sign of life that are a hang")
    restarts: int = Field(3, ge=0, description="deaths and hangs before the run gives up")

    @field_validator("sync_bn", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: object) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.optimizer != "sgd" and self.nesterov:
            raise ValueError(f"{self.optimizer} has no nesterov momentum: leave nesterov out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two numbers from 0, less than 1; got {self.betas}")
        if self.lr_end and self.schedule != "cosine":
            raise ValueError(f"lr_end belongs to schedule=cosine, not to {self.schedule}")
        if self.evaluate_data is not None and self.evaluate is None:
            raise ValueError('evaluate_data is for evaluate: set train.evaluate="1 epoch" too')
        if self.average_from is not None and self.average_from >= self.epochs:
            raise ValueError(
                f"average_from {self.average_from} is not before the end, epochs={self.epochs}"
            )
        parts = self.ranks * self.accumulate
        if self.batch % parts:
            raise ValueError(
                f"batch {self.batch} cannot be shared by {self.ranks} ranks in {self.accumulate} "
                f"parts; choose a multiple of {parts}"
            )
        return self


class InitSection(Section):
    """What a new run starts from, instead of random weights and a first clustering."""

    weights: str | None = Field(
        None,
        description="a run, a checkpoint, an export, a .pth or .safetensors file of others, "
        "torchvision:NAME, timm:NAME or hf-hub:REPOSITORY",
    )
    assignments: str | None = Field(None, description="a round of another run")


class KeepSection(Section):
    """How much of the past stays on disk.

    Assignments are all kept.
    """

    features: int = Field(1, ge=0)
    checkpoints: int = Field(3, ge=1)

"""Which decoder a run's pixels come from, where GPUs decode (`data.decode=gpu`): kept in data.json.

Another GPU or torchvision may give other pixels, so a run goes on with what it began with. Who
resumes it may accept another decoder, once, which the run's events say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from deepclust.errors import DataError, RecipeError, ResourceError, RunDiffersError
from deepclust.files import fits, read_record, write_json
from deepclust.run.directory import Run

FILE = "data.json"
DECODER, ACCEPTS = "decoder", "accepts_decoder"  # of data.json


@dataclass(frozen=True)
class Decoder:
    """The hash of what a decoder makes of known JPEGs, and what it is, for people."""

    hash: str
    by: str

    def __str__(self) -> str:
        return f"{self.hash[:12]} ({self.by})"


def read(run: Run) -> Decoder | None:
    """Return the decoder that a run began with, None where CPUs decode or none has begun.

    Raises `DataError` for a damaged record.
    """
    file = run.path / FILE
    record = read_record(file, {}) if file.exists() else {}
    return _decoder(record[DECODER], file) if record.get(DECODER) is not None else None


def settle(run: Run, here: Decoder, tell: Callable[[str], None]) -> Decoder:
    """Return the decoder of the run, which is that of here where it begins or accepts another.

    One process does this, for all, and holds the run.
    """
    began, file = read(run), run.path / FILE
    record = read_record(file, {})
    accepts = record.pop(ACCEPTS, False) is True
    if began is not None and not accepts:
        return began
    if began is not None and began.hash != here.hash:
        tell(f"images were decoded by {began} so far, and from here on by {here} (accepted)")
    run.fence()
    write_json(file, {**record, DECODER: asdict(here)})
    return here


def accept(run: Run) -> None:
    """Let the next attempt of a run decode by what is there then.

    Raises `RecipeError` for a run whose CPUs decode.
    """
    if run.recipe.data.decode != "gpu":
        raise RecipeError(
            f"--accept-decoder is for runs with data.decode=gpu, and {run.path} has another: leave "
            "it out"
        )
    file = run.path / FILE
    if file.exists():
        run.fence()
        write_json(file, {**read_record(file, {}), ACCEPTS: True})


def check(run: Run, began: Decoder, first: Decoder, here: Decoder) -> None:
    """Raise `RunDiffersError` where a rank decodes by something else than the run began with.

    `first` is what the first rank has. Raises `ResourceError` if this rank has another.
    """
    if here.hash != first.hash:
        raise ResourceError(
            f"the ranks of {run.path} decode JPEGs differently: {first} and {here}. Give it GPUs "
            "of one kind and one torchvision"
        )
    if here.hash != began.hash:
        raise RunDiffersError(
            f"{run.path} began with images decoded by {began}, and here that is {here}, whose "
            "pixels are not the same. Resume it on the GPUs and the torchvision of before, or go "
            f"on with these: deepclust resume {run.path} --accept-decoder"
        )


def _decoder(value: object, file: Path) -> Decoder:
    whole = isinstance(value, dict) and all(fits(value.get(key), str) for key in ("hash", "by"))
    if not whole:
        raise DataError(f"{file} is damaged: its {DECODER!r} names none. Delete it and resume")
    assert isinstance(value, dict)
    return Decoder(value["hash"], value["by"])

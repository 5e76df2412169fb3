"""Which members of a sample are its image and its label (`data.image`, `data.labels`).

A member's field is its extension: "jpg" of KEY.jpg, "input.jpg" of KEY.input.jpg. A label that
cannot be read counts as none. It is counted with the reason and never ends a run that needs none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deepclust.data.label_sets import join_names, names_in
from deepclust.data.shards.left_out import Tally, listed
from deepclust.data.shards.tar import Shard, TarEntry

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")
LABEL_FIELDS = ("label", "cls", "class")
AUTO, NONE, FOLDER = "auto", "none", "folder"

_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,20}\s*")
_LARGEST_IMAGE = int(np.iinfo(np.uint32).max)
_LARGEST_LABEL = int(np.iinfo(np.int32).max)
_LARGEST_TEXT = 1 << 20  # bytes of a member that is read for a label
_LARGEST_NAME = 256  # bytes of the name of a class
_LARGEST_SET = 1 << 14  # bytes of all names of a label


class Fields(NamedTuple):
    """What is read of a sample.

    image   auto (KEY.jpg, KEY.png, ...) or a field such as "input.jpg"
    labels  auto (the integer in KEY.cls or KEY.json), none, folder (the folder in the tar), or a
            field such as "cls", "txt", "json" or "json.KEY", whose text is the name of the class.
            Several classes have | between them, a line each, or are a list in JSON
    """

    image: str = AUTO
    labels: str = AUTO

    @property
    def names_classes(self) -> bool:
        """Whether labels are names, which the index numbers."""
        return self.labels not in (AUTO, NONE)


DEFAULT = Fields()


def fields_from(image: str, labels: str) -> Fields:
    """Return the fields of `data.image` and `data.labels`: extensions are in lower case."""
    extension, dot, key = labels.removeprefix(".").partition(".")
    if extension.lower() != "json":
        key = key.lower()
    return Fields(image.removeprefix(".").lower(), f"{extension.lower()}{dot}{key}")


class Sample(NamedTuple):
    """A sample's key, and its members by field."""

    key: str
    files: dict[str, TarEntry]


def find_image(sample: Sample, field: str, left: Tally) -> TarEntry:
    """Return the entry of the sample's image, or one of size 0 with the reason as its name.

    Other images of a sample are counted in `left`.
    """
    wanted = IMAGE_EXTENSIONS if field == AUTO else (field,)
    images = [sample.files[name] for name in wanted if name in sample.files]
    if not images:
        return TarEntry(_missing(sample, field), 0, 0)
    if field == AUTO and len(sample.files) > 1:
        for member in image_fields(sample):
            if sample.files[member] is not images[0]:
                left.add("further image of a sample that has one", sample.files[member].name)
    if images[0].size == 0:
        return TarEntry("image of 0 bytes", 0, 0)
    if images[0].size > _LARGEST_IMAGE:
        return TarEntry(f"image of {images[0].size} bytes, more than {_LARGEST_IMAGE}", 0, 0)
    return images[0]


def image_fields(sample: Sample) -> list[str]:
    """Return the fields that end in an image's extension, such as "jpg" and "input.jpg"."""
    return [name for name in sample.files if name.rpartition(".")[2] in IMAGE_EXTENSIONS]


def _missing(sample: Sample, field: str) -> str:
    what = "no image member" if field == AUTO else f"no .{field}"
    return f"{what}, only {listed(f'.{name}' for name in sample.files)}"


class NoLabel(Exception):
    """A sample has no label; the text is the reason."""


def label_number(shard: Shard, sample: Sample, unlabelled: Tally) -> int:
    """Return the integer in KEY.cls or else KEY.json, or -1 and count why there is none."""
    try:
        for extension, parse in _NUMBER_PARSERS.items():
            if extension in sample.files:
                return _in_range(parse(_read_text(shard, sample.files[extension], extension)))
        raise NoLabel(NO_LABEL_MEMBER)
    except NoLabel as reason:
        unlabelled.add(str(reason), sample.key)
        return -1


def label_name(shard: Shard, sample: Sample, field: str, unlabelled: Tally) -> str | None:
    """Return the name of the sample's class, or None and count why there is none."""
    try:
        return _class_name(shard, sample, field)
    except NoLabel as reason:
        unlabelled.add(str(reason), sample.key)
        return None


def _class_name(shard: Shard, sample: Sample, field: str) -> str:
    if field == FOLDER:
        folder = sample.key.removeprefix("./").rpartition("/")[0].rpartition("/")[2]
        return _checked_name(folder, "no folder")
    extension, _, key = field.partition(".")
    member = sample.files.get(field) or (sample.files.get("json") if extension == "json" else None)
    if member is None:
        raise NoLabel(f"no .{extension if extension == 'json' else field}")
    text = _read_text(shard, member, extension)
    if field == "json" or (extension == "json" and field not in sample.files):
        return _checked_name(_json_name(_json(text), key), f".json without {key or 'a label'}")
    lines = text.decode("utf-8", "backslashreplace").strip().splitlines()
    name = lines[0] if len(lines) == 1 else join_names(lines) if lines else ""
    return _checked_name(name, f".{field} that is not a name")


def _checked_name(name: str, reason: str) -> str:
    name = name.strip()
    if name == "-1":
        raise NoLabel(LABEL_SAYS_NONE)
    sizes = [len(one.encode(errors="surrogateescape")) for one in (name, *names_in(name))]
    if not name or sizes[0] > _LARGEST_SET or max(sizes[1:], default=0) > _LARGEST_NAME:
        raise NoLabel(reason)
    if "\n" in name:
        raise NoLabel(reason)
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _json_name(fields: Any, key: str) -> str:
    """Return the text or whole number at KEY or A.B of a JSON document, or "".

    A list of them is a label of several classes, and an empty one is a label of none.
    """
    if not key:
        fields = fields if isinstance(fields, dict) else {}
        key = next((name for name in LABEL_FIELDS if name in fields), "")
    for part in key.split("."):
        fields = fields.get(part) if isinstance(fields, dict) else None
    if not isinstance(fields, list):
        return _text_of(fields)
    names = [_text_of(one) for one in fields]
    return join_names(names) if all(names) else ""


def _text_of(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


NO_LABEL_MEMBER = "no .cls and no .json"
LABEL_SAYS_NONE = "label -1"


def _in_range(label: int) -> int:
    if label == -1:
        raise NoLabel(LABEL_SAYS_NONE)
    if not 0 <= label <= _LARGEST_LABEL:
        raise NoLabel(f"label below -1 or above {_LARGEST_LABEL}")
    return label


def _cls_number(text: bytes) -> int:
    if not _INTEGER.fullmatch(text):
        raise NoLabel(".cls that is not an integer (data.labels=cls takes text)")
    return int(text)


def _json_number(text: bytes) -> int:
    fields = _json(text)
    values = [fields.get(name) for name in LABEL_FIELDS] if isinstance(fields, dict) else []
    integers = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    if not integers:
        raise NoLabel(".json without an integer label, cls or class")
    return integers[0]


_NUMBER_PARSERS: dict[str, Callable[[bytes], int]] = {"cls": _cls_number, "json": _json_number}


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NoLabel(".json that cannot be read") from None


def _read_text(shard: Shard, member: TarEntry, extension: str) -> bytes:
    if member.size > _LARGEST_TEXT:
        raise NoLabel(f".{extension} of more than 1 MiB")
    return shard.read(member.size, member.offset)

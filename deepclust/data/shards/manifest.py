"""The manifest of an index: what was indexed, and the hashes that show damage.

`manifest.json` is read once, when an index is opened. It may come from somebody else, so every part
of it is checked before it is used. `seal` is the hash of all the rest. Manifests of older versions
have neither seal nor hashes of columns, and go on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from deepclust.data.shards.fields import AUTO, Fields
from deepclust.data.shards.header import BLOCK
from deepclust.errors import DataError

MANIFEST = "manifest.json"
FOLDER = "deepclust-index"
FORMAT = 1
LARGEST_MANIFEST = 1 << 30  # bytes


class ShardEntry(TypedDict):
    """One shard: name, size in bytes, number of samples, and digest of its members.

    The name is the base name, or the path below the common folder (`url.names_of`).
    `labels` is the digest of its labels, `bodies` the hash of all its bytes, if that was asked for.
    """

    name: str
    size: int
    samples: int
    digest: str
    labels: NotRequired[str]
    bodies: NotRequired[str]


class Manifest(TypedDict):
    """The content of manifest.json, where `excluded` maps sample ids (as text) to reasons."""

    format: int
    fingerprint: str
    labelled: bool
    shards: list[ShardEntry]
    excluded: dict[str, str]
    fields: NotRequired[dict[str, str]]  # data.image and data.labels, as they were asked for
    image_field: NotRequired[str]  # what image=auto came to, if not KEY.jpg, KEY.png, ...
    classes: NotRequired[list[str]]  # the names of the labels, if the shards have names
    left_out: NotRequired[dict[str, dict[str, Any]]]  # reason: count and examples
    unlabelled: NotRequired[dict[str, dict[str, Any]]]
    notes: NotRequired[list[str]]  # what else to know, in sentences
    files: NotRequired[dict[str, Any]]  # of image files: the digest of all paths and labels
    columns: NotRequired[dict[str, dict[str, Any]]]  # file: bytes and hash
    seal: NotRequired[str]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an index.

    Raises DataError, with the command that mends it, if it is missing, damaged or makes no sense.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise damaged(folder, f"{MANIFEST} has {path.stat().st_size} bytes")
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"no index in {folder}. `deepclust index SHARDS` writes it.") from error
    except OSError as error:
        raise DataError(f"the index {folder} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged(folder, f"{MANIFEST} is not JSON") from error
    if wrong := _why_wrong(manifest):
        raise damaged(folder, wrong)
    checked: Manifest = manifest
    return checked


def damaged(folder: Path, what: str) -> DataError:
    """Return the error for an index that cannot be used, whatever the shards are."""
    return DataError(
        f"the index {folder} is damaged: {what}. The shards may well be whole: "
        f"`deepclust index SHARDS --index {folder}` writes it again."
    )


def fields_of(manifest: Manifest) -> Fields:
    """Return what was asked for when the index was made."""
    return Fields(**manifest.get("fields", {}))


def scanned_fields(manifest: Manifest) -> Fields:
    """Return what a scan must read to give the same index."""
    fields = fields_of(manifest)
    return fields._replace(image=manifest.get("image_field", fields.image))


def fingerprint(shards: Iterable[ShardEntry]) -> str:
    """Return the hash of the shards' names, sizes and members."""
    identity = repr([(one["name"], one["size"], one["digest"]) for one in shards])
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def seal(manifest: Manifest) -> str:
    """Return the hash of all of a manifest but the seal."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _why_wrong(manifest: Any) -> str:
    """Return what is wrong with a manifest, or ""."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"its manifest does not have format {FORMAT}"
    if "seal" in manifest and manifest["seal"] != seal(manifest):  # type: ignore[arg-type]
        return f"{MANIFEST} is not as it was written"
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not shards or not all(map(_is_entry, shards)):
        return "its manifest has no valid list of shards"
    names = [one["name"] for one in shards]
    if any(before >= after for before, after in itertools.pairwise(names)):
        return "its shards are not in the order of their names"
    if manifest.get("fingerprint") != fingerprint(shards):
        return "its fingerprint is not that of its shards"
    if type(manifest.get("labelled")) is not bool:
        return "its manifest does not say whether there are labels"
    excluded, samples = manifest.get("excluded"), sum(one["samples"] for one in shards)
    if not isinstance(excluded, dict) or not all(
        _is_excluded(*e, samples) for e in excluded.items()
    ):
        return "its list of excluded samples makes no sense"
    return _why_extras_wrong(manifest)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    name, size, samples = (entry.get(key) for key in ("name", "size", "samples"))
    if (
        not isinstance(name, str)
        or not {"", ".", ".."}.isdisjoint(name.split("/"))
        or type(size) is not int
        or type(samples) is not int
    ):
        return False
    # Every sample has a header, so that a forged count cannot make us allocate much.
    return 0 < samples <= size // BLOCK and isinstance(entry.get("digest"), str)


def _is_excluded(sample: str, reason: Any, samples: int) -> bool:
    number = sample.isascii() and sample.isdecimal() and len(sample) < 20
    return number and int(sample) < samples and isinstance(reason, str)


def _why_extras_wrong(manifest: dict[str, Any]) -> str:
    """Return what is wrong with the parts that older manifests lack, or ""."""
    fields = manifest.get("fields", {})
    names = (
        [*fields.values(), manifest.get("image_field", AUTO)] if isinstance(fields, dict) else [0]
    )
    if not all(isinstance(name, str) for name in names) or set(fields) - {"image", "labels"}:
        return "its fields make no sense"
    for part in ("classes", "notes"):
        texts = manifest.get(part, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"its {part} make no sense"
    if not isinstance(manifest.get("files", {}), dict):
        return "its files make no sense"
    for part in ("left_out", "unlabelled", "columns"):
        value = manifest.get(part, {})
        if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
            return f"its part {part!r} makes no sense"
    return ""

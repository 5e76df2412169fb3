"""What a user should know of an index, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from deepclust.data.shards.fields import NO_LABEL_MEMBER
from deepclust.data.shards.left_out import Tally, listed, shown
from deepclust.data.shards.manifest import Manifest


def notes(manifest: Manifest, keys: Sequence[str], *, labels: bool) -> list[str]:
    """Return what was left out, by reason with examples, and with `labels` what has none."""
    excluded = Tally()
    for sample, reason in manifest["excluded"].items():
        excluded.add(reason, keys[int(sample)] if excluded.wants(reason) else "")
    left = Tally(manifest.get("left_out"))
    unlabelled = Tally(manifest.get("unlabelled") if labels else None)
    if not manifest["labelled"] and unlabelled.reasons == {NO_LABEL_MEMBER}:
        unlabelled = Tally()  # shards without labels, and nothing is wrong with them
    lines = [
        f"{tally.total} {what}: {tally}"
        for what, tally in (
            (f"of {len(keys)} samples left out", excluded),
            ("files and members left out", left),
            (f"of {len(keys)} samples have no label", unlabelled),
        )
        if tally.total
    ]
    lines += manifest.get("notes", [])
    image = manifest.get("image_field")
    return [f"the image of every sample is KEY.{shown(image)}", *lines] if image else lines


def describe_labels(manifest: Manifest) -> str:
    """Return "labels", "no labels", or the number and names of classes."""
    names = manifest.get("classes")
    if not manifest["labelled"]:
        return "no labels"
    return "labels" if names is None else f"{len(names)} classes ({listed(names)})"


def describe_check(manifest: Manifest) -> str:
    """Return what `index --verify` has compared."""
    bodies = all("bodies" in entry for entry in manifest["shards"])
    images = (
        "all bytes of the shards are as hashed"
        if bodies
        else "the images' bytes were not compared (`deepclust index --bodies` hashes them)"
    )
    return f"every header, label and row of the index is as indexed; {images}"

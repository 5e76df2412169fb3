"""One folder for each cluster, with the images in it: files that are extracted, linked or copied.

A folder has the name of the class, where seeds give one to a single cluster, else the cluster's
number. Images in shards are written with their bytes as they are. Images that are files of their
own are linked, or copied. Those without a cluster are left out, and counted.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster_jobs.results.assignments import Clusters, clustered
from cluster_jobs.results.samples import Part, parts_of
from deepclust.data.loose.index import FileIndex
from deepclust.data.read.image_files import open_images
from deepclust.data.read.shard_files import ShardFiles
from deepclust.data.shards.index import Index
from deepclust.errors import RecipeError
from deepclust.files import atomic_folder, disk_errors
from deepclust.run.directory import open_run

LONGEST = 120  # letters of a name
_ODD = re.compile(r"[^\w .+~()-]")
EXTENSIONS = (  # by the first bytes
    (b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"),
    (b"II*\0", ".tif"), (b"MM\0*", ".tif"), (b"P6", ".ppm"), (b"P5", ".pgm"),
)  # fmt: skip


def write_folders(
    run_dir: Path,
    out: Path,
    how: str | None = None,
    round: int | None = None,
    *,
    remote: bool = False,
    emit: Callable[[str], None],
) -> int:
    """Write the images of a run into a folder for each cluster of head 0, and return their number.

    `how` is "link" or "copy", for images that are files of their own (default: link). Raises
    `RecipeError` for a folder that is there already, or links to images that are in shards.
    """
    with disk_errors(out):
        _refuse_existing(out)
    with clustered(open_run(run_dir), round, remote, emit) as (index, known):
        if how is not None and not isinstance(index, FileIndex):
            raise RecipeError(
                f"the images of {run_dir} are in shards, so they are written as files: leave "
                f"--{how} out"
            )
        if len(known.assignments) > 1:
            emit(f"note: the run has {len(known.assignments)} clusterings: these are of head 0")
        if absent := int((known.assignments[0] < 0).sum()):
            emit(f"note: {absent} images have no cluster, and are in no folder")
        job = _Job(index, known, how or "link", {})
        atomic_folder(Path(out).absolute(), job.fill, before=lambda: _refuse_existing(out))
        return job.count


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise RecipeError(f"{out} exists already. Choose another folder, or delete it first.")


@dataclass
class _Job:
    """The images to write, and the names of the folders by cluster, as they are made."""

    index: Index
    known: Clusters
    how: str
    made: dict[int, Path]
    count: int = 0

    def fill(self, folder: Path) -> None:
        """Write all images, shard by shard, in the order of their ids."""
        files = open_images(self.index)
        names = self._names()
        try:
            for part in parts_of(self.index):
                clusters = self.known.assignments[0, part.first : part.last]
                for place in np.flatnonzero(clusters >= 0).tolist():
                    number = int(clusters[place])
                    if number not in self.made:
                        self.made[number] = folder / names.get(number, f"{number:04d}")
                        self.made[number].mkdir(exist_ok=True)
                    self._put(self.made[number], part, place, files)
        finally:
            files.close()

    def _names(self) -> dict[int, str]:
        """Return the folder of each cluster that stands for a class."""
        if self.known.classes is None:
            return {}
        named = {i: str(c) for i, c in enumerate(self.known.classes[:-1]) if c is not None}
        safe = {i: safe_name(name) for i, name in named.items()}
        counts = Counter(name.lower() for name in safe.values())  # some disks know no case
        return {i: n if counts[n.lower()] == 1 else f"{n}-{i:04d}" for i, n in safe.items()}

    def _put(self, folder: Path, part: Part, place: int, files: ShardFiles) -> None:
        """Write, link or copy one image."""
        sample = part.first + place
        if isinstance(self.index, FileIndex):
            source = Path(os.path.abspath(self.index.paths[sample]))
            target = _free(folder, source.stem, source.suffix, sample)
            os.symlink(source, target) if self.how == "link" else shutil.copyfile(source, target)
        else:
            at = self.index.locate(np.array([sample]))
            data = files.read(*(int(column[0]) for column in at))
            stem = str(part.keys[place]).rsplit("/", 1)[-1]
            _free(folder, stem, extension_of(data), sample).write_bytes(data)
        self.count += 1


def _free(folder: Path, stem: str, suffix: str, sample: int) -> Path:
    """Return a path of that name, or with the sample's id where the name is taken."""
    target = folder / f"{safe_name(stem)}{safe_name(suffix) if suffix else ''}"
    if os.path.lexists(target):
        return target.with_name(f"{safe_name(stem)}~{sample}{target.suffix}")
    return target


def safe_name(text: str) -> str:
    """Return a text as the name of a file that leads nowhere else: keys may be anybody's."""
    name = _ODD.sub("_", text)[:LONGEST].rstrip(" .")
    return name if name.strip(". ") else f"_{name.strip('. ')}"


def extension_of(data: bytes) -> str:
    """Return the usual extension of an image with these first bytes, "" for an unknown one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((extension for start, extension in EXTENSIONS if data.startswith(start)), "")

"""Bytes of image files that are read where they lie: each is opened, read and closed.

A file that is gone, or another one than was indexed, is one bad image, as a damaged one is. It is
replaced, counted and judged by `data.max_bad`. A folder that is gone, or a storage that fails,
stops the run, as for shards.
"""

from __future__ import annotations

from pathlib import Path

from deepclust.data.loose.files import FilePaths
from deepclust.data.loose.index import FileIndex
from deepclust.data.pack.blobs import read_file
from deepclust.data.pack.stored import Packer, copied_as
from deepclust.data.read.shard_files import FINAL, PATIENCE_S, ShardFiles
from deepclust.data.shards.index import Index
from deepclust.errors import DataError

_RESTORE = "Restore it, or index the images again with `deepclust index`, for a new run."


def open_images(
    index: Index, cache: Path | None = None, patience_s: float = PATIENCE_S
) -> ShardFiles:
    """Return the reader of an index's images: out of shards, or of files of their own."""
    if isinstance(index, FileIndex):
        return ImageFiles(index.paths, patience_s)
    return ShardFiles(index.shards, cache, index.lengths, patience_s=patience_s)


class ImageFiles(ShardFiles):
    """A reader of whole image files, whose ordinals are the sample ids.

    None stays open. An image of a format that shards do not hold is returned as the PNG that `pack`
    would write.
    """

    def __init__(self, paths: FilePaths, patience_s: float = PATIENCE_S) -> None:
        super().__init__(paths, patience_s=patience_s)
        self.paths, self._packer = paths, Packer()

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.paths[shard]
        data = read_file(path)
        if copied_as(path.name, data) is None:
            data = self._packer.png(data)  # as `pack` does
        if len(data) != size:
            raise DataError(
                f"{path} gives {len(data)} bytes, and gave {size} when it was indexed. {_RESTORE}"
            )
        return data

    def _unreachable(self, shard: int, error: Exception, waited: float) -> DataError:
        is_file = getattr(error, "errno", None) in FINAL and self.paths.root(shard).is_dir()
        if not is_file:
            return super()._unreachable(shard, error, waited)
        reason = getattr(error, "strerror", error)
        return DataError(f"{self.paths[shard]}: {reason}. {_RESTORE}")

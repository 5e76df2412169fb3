"""Find or fetch Fashion-MNIST's four idx files (70,000 images, MIT licence).

The places are tried in this order: the folder given, Debian's /usr/share/datasets/fashion-mnist,
Debian's package (installed as root, else unpacked into the folder), torchvision's download.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deepclust.errors import DataError

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
NAMES = [
    f"{split}-{what}-ubyte"
    for split in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
]


def fetch(folder: Path) -> Path:
    """Return a folder that holds the four files, or raise DataError with the remedy."""
    folder = folder.absolute()
    for place in places(folder):
        if complete(place):
            return place
    raise DataError(
        f"Fashion-MNIST is not here and could not be fetched. Install Debian's {PACKAGE}, or put "
        f"{', '.join(f'{name}.gz' for name in NAMES)} "
        f"(https://github.com/zalandoresearch/fashion-mnist) into {folder}."
    )


def places(folder: Path) -> Iterator[Path]:
    """Yield folders that may hold the files, and fetch them before the later ones."""
    yield folder
    yield INSTALLED
    if shutil.which("apt-get"):
        if os.geteuid() == 0 and with_update("apt-get", "install", "--yes", PACKAGE):
            yield INSTALLED
        yield unpack(folder)
    yield from torchvision(folder)


def complete(folder: Path) -> bool:
    """Return whether the four files are there, compressed or not."""
    return all((folder / n).exists() or (folder / f"{n}.gz").exists() for n in NAMES)


def with_update(*command: str, where: Path | None = None) -> bool:
    """Run an apt command, and after a failure update apt's lists and repeat it once."""
    if quiet(*command, where=where):
        return True
    return quiet("apt-get", "update", where=where) and quiet(*command, where=where)


def quiet(*command: str, where: Path | None = None) -> bool:
    """Run a command with its output on stderr, so that stdout holds only the folder."""
    sys.stderr.write(f"+ {' '.join(command)}\n")
    return subprocess.run(command, cwd=where, stdout=sys.stderr, check=False).returncode == 0


def unpack(folder: Path) -> Path:
    """Download and unpack Debian's package, which needs no root."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        if with_update("apt-get", "download", PACKAGE, where=temporary):
            archive = next(temporary.glob("*.deb"))
            if quiet("dpkg-deb", "-x", str(archive), str(temporary / "root")):
                shutil.copytree(
                    temporary / "root" / INSTALLED.relative_to("/"), folder, dirs_exist_ok=True
                )
    return folder


def torchvision(folder: Path) -> Iterator[Path]:
    """Download from torchvision's mirror, which checks MD5 sums, and yield the folder."""
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
        yield folder / "FashionMNIST" / "raw"
    except Exception as error:
        sys.stderr.write(f"torchvision: {error}\n")

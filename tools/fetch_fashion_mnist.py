#!/usr/bin/env python3
"""Find or fetch Fashion-MNIST's four idx files and print the folder that holds them.

Looks in this order: the folder given, Debian's /usr/share/datasets/fashion-mnist, Debian's package
(installed as root, else unpacked into the folder), torchvision's download into the folder. Standard
library only, until torchvision is asked.

    python tools/fetch_fashion_mnist.py [FOLDER]        # FOLDER: datasets/fashion-mnist by default
    deepclust pack idx:$(python tools/fetch_fashion_mnist.py)/train shards/train
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
NAMES = [
    f"{split}-{what}-ubyte"
    for split in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
]


def main() -> int:
    """Try each way in turn; 0 and the folder on stdout, or 3 and what to do on stderr."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "datasets/fashion-mnist").absolute()
    for place in places(folder):
        if complete(place):
            print(place)
            return 0
    print(
        f"Fashion-MNIST is not here and could not be fetched. Install Debian's {PACKAGE}, or put "
        f"{', '.join(f'{name}.gz' for name in NAMES)} "
        f"(https://github.com/zalandoresearch/fashion-mnist) into {folder}.",
        file=sys.stderr,
    )
    return 3


def places(folder: Path) -> Iterator[Path]:
    """Folders where the files may now be; asking for the next one tries harder."""
    yield folder
    yield INSTALLED
    if shutil.which("apt-get"):
        if os.geteuid() == 0 and with_update("apt-get", "install", "--yes", PACKAGE):
            yield INSTALLED
        yield unpack(folder)
    yield from torchvision(folder)


def complete(folder: Path) -> bool:
    """Whether the four files are there, compressed or not."""
    return all((folder / n).exists() or (folder / f"{n}.gz").exists() for n in NAMES)


def with_update(*command: str, where: Path | None = None) -> bool:
    """Run an apt command; if it fails, update apt's lists and try once more."""
    if quiet(*command, where=where):
        return True
    return quiet("apt-get", "update", where=where) and quiet(*command, where=where)


def quiet(*command: str, where: Path | None = None) -> bool:
    """Run a command with its output on stderr, so that stdout holds only the folder."""
    print("+", *command, file=sys.stderr)
    return subprocess.run(command, cwd=where, stdout=sys.stderr, check=False).returncode == 0


def unpack(folder: Path) -> Path:
    """Debian's package without root: download it and take the files out."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        if with_update("apt-get", "download", PACKAGE, where=temporary):
            archive = next(temporary.glob("*.deb"))
            if quiet("dpkg-deb", "-x", str(archive), str(temporary / "root")):
                files = temporary / "root" / INSTALLED.relative_to("/")
                shutil.copytree(files, folder, dirs_exist_ok=True)
    return folder


def torchvision(folder: Path) -> Iterator[Path]:
    """Download from the mirror that torchvision knows; it checks MD5 sums."""
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
        yield folder / "FashionMNIST" / "raw"
    except Exception as error:
        print(f"torchvision: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

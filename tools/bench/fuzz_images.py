#!/usr/bin/env python3
"""Damage small images in many ways, and see what decoding and packing do with them.

    python tools/bench/fuzz_images.py [--mutations 5000] [--seed 0] [--out fuzz_images.json]

Prints a table and writes it as JSON. Every mutation is decoded, then all of them are packed at
once, and what was packed is decoded as extraction does. The outcomes are:

    image       pixels came out, uint8 [3, h, w]
    error       a DecodeError with a reason
    traceback   any other exception
    hang        longer than LIMIT_S, of one image
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.pack.pack import pack

LIMIT_S = 10.0
STUCK_S = 120  # after which the process says where it is, and ends
FORMATS = {
    "png": ("PNG", {}), "jpg": ("JPEG", {}), "gif": ("GIF", {}), "tif": ("TIFF", {}),
    "webp": ("WEBP", {}), "bmp": ("BMP", {}), "ppm": ("PPM", {}), "avif": ("AVIF", {}),
    "jp2": ("JPEG2000", {}), "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "large.png": ("PNG", {}), "exif.png": ("PNG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}),
}  # fmt: skip
OUTCOMES = ("image", "error", "traceback", "hang")
Random = np.random.Generator


def seeds() -> dict[str, bytes]:
    """Return one small image of each format, and two of 16 bits."""
    random, images = np.random.default_rng(0), {}
    for name, (format_, options) in FORMATS.items():
        side = 64 if name.startswith("large") else 16
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        images[name] = encoded(Image.fromarray(pixels), format_, **options)
    deep = Image.fromarray(random.integers(0, 65536, (16, 16), dtype=np.uint16))
    return images | {"16.png": encoded(deep, "PNG"), "16.tif": encoded(deep, "TIFF")}


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    """Return the bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def flip(data: bytearray, random: Random) -> bytearray:
    """Change one to eight bytes."""
    for place in random.integers(0, len(data), random.integers(1, 9)):
        data[place] = random.integers(256)
    return data


def header(data: bytearray, random: Random) -> bytearray:
    """Change bytes of the first 64 to extremes, which are sizes and offsets."""
    for place in random.integers(2, min(64, len(data)), random.integers(1, 5)):
        data[place] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
    return data


def cut(data: bytearray, random: Random) -> bytearray:
    """Cut the end off."""
    return data[: random.integers(0, len(data))]


def lose(data: bytearray, random: Random) -> bytearray:
    """Lose a piece in the middle."""
    start = random.integers(0, len(data))
    return data[:start] + data[start + random.integers(1, 40) :]


def repeat(data: bytearray, random: Random) -> bytearray:
    """Repeat a piece."""
    start, length = random.integers(0, len(data)), random.integers(1, 200)
    return data[: start + length] + data[start:]


def insert(data: bytearray, random: Random) -> bytearray:
    """Insert random bytes."""
    start = random.integers(0, len(data))
    return data[:start] + bytearray(random.bytes(random.integers(1, 60))) + data[start:]


MUTATIONS: tuple[Callable[[bytearray, Random], bytearray], ...] = (
    flip, header, cut, lose, repeat, insert,
)  # fmt: skip


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield a file's name and damaged bytes, each format and each kind of damage in turn."""
    whole = list(seeds().items())
    for i in range(count):
        random = np.random.default_rng([seed, i])
        name, data = whole[i % len(whole)]
        damage = MUTATIONS[i // len(whole) % len(MUTATIONS)]
        yield f"{i:06d}.{name}", bytes(damage(bytearray(data), random))


def outcome(data: bytes) -> tuple[str, str]:
    """Decode one image, and return what happened and the error."""
    began, reason = time.monotonic(), ""
    try:
        image = decode(data)
        assert image.numel() == 3 * image[0].numel() > 0
        what = "image"
    except DecodeError as error:
        what, reason = "error", str(error)
    except Exception as error:
        what, reason = "traceback", repr(error)
    return ("hang" if time.monotonic() - began > LIMIT_S else what), reason


def fuzz(count: int, seed: int, folder: Path) -> dict[str, dict[str, int]]:
    """Return the outcomes by stage and format."""
    tables: dict[str, Counter[str]] = {}
    photos = folder / "in"
    photos.mkdir()
    for name, data in mutations(count, seed):
        (photos / name).write_bytes(data)  # before it is decoded, to be there after a crash
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        what, reason = outcome(data)
        tables.setdefault(f"decode {name.partition('.')[2]}", Counter())[what] += 1
        if what in ("traceback", "hang"):
            print(f"{what}: {name}: {reason}", file=sys.stderr)
    tables |= packed(photos, folder / "out", count)
    faulthandler.cancel_dump_traceback_later()
    return {stage: {name: table[name] for name in OUTCOMES} for stage, table in tables.items()}


def packed(photos: Path, out: Path, count: int) -> dict[str, Counter[str]]:
    """Pack all files at once, and decode what was packed: both account for every file."""
    faulthandler.dump_traceback_later(STUCK_S + count, exit=True)
    index = pack(photos, out)
    left = json.loads((out / "dataset.json").read_text()).get("left_out", {})
    stages = {"pack": Counter(image=len(index), error=sum(left.values())), "extract": Counter()}
    stages["pack"]["traceback"] = count - stages["pack"].total()
    for shard, offset, size in zip(*index.locate(np.arange(len(index))), strict=True):
        with open(index.shards[shard], "rb") as file:
            file.seek(offset)
            stages["extract"][outcome(file.read(size))[0]] += 1
    return stages


def main() -> None:
    """Print the table, and write it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--mutations", type=int, default=5000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("fuzz_images.json"))
    asked = options.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tables = fuzz(asked.mutations, asked.seed, Path(folder))
    print(f"{'':18}" + "".join(f"{name:>11}" for name in OUTCOMES))
    for stage, table in tables.items():
        print(f"{stage:18}" + "".join(f"{table[name]:11}" for name in OUTCOMES))
    seconds = round(time.monotonic() - began, 1)
    asked.out.write_text(json.dumps({"seconds": seconds, "outcomes": tables}, indent=1) + "\n")
    print(f"{asked.mutations} mutations, {seconds} s: {asked.out}")


if __name__ == "__main__":
    main()

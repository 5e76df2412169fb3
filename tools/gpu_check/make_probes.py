"""Make `deepclust/data/images/probes.tar.gz`, the JPEGs whose decoded pixels name a decoder.

    python tools/gpu_check/make_probes.py FILE

It is not run again: another encoder gives other bytes, and every run that decodes on GPUs would
differ from what it began with. It says how the file was made (Pillow 13.0, libjpeg-turbo 3.2).
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((8, 8), (16, 16), (17, 33), (31, 15), (48, 40), (64, 64), (75, 50), (97, 61))
KINDS = ("L", 0, 1, 2)  # grey, 4:4:4, 4:2:2, 4:2:0
QUALITIES = (40, 75, 90, 98)


def pattern(height: int, width: int, seed: int) -> np.ndarray:
    """Slow waves of each colour, a hard edge and weak noise, uint8 [h, w, 3]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phase, speed = random.uniform(0, 6, 3), random.uniform(0.02, 0.3, (2, 3))
    waves = np.sin(y[..., None] * speed[0] + x[..., None] * speed[1] + phase)
    image = 128 + 100 * waves + random.normal(0, 4, (height, width, 3))
    image[height // 3 :, width // 2 :] = 255 - image[height // 3 :, width // 2 :]
    return image.clip(0, 255).astype(np.uint8)


def jpeg(height: int, width: int, number: int) -> bytes:
    """One JPEG: its kind and quality go by its number."""
    kind, quality = KINDS[number % 4], QUALITIES[number // 4 % 4]
    image = Image.fromarray(pattern(height, width, number))
    options = {"quality": quality, "optimize": number % 3 == 0}
    if number % 5 == 0:
        options["restart_marker_blocks"] = 4
    file = io.BytesIO()
    if kind == "L":
        image.convert("L").save(file, "JPEG", **options)
    else:
        image.save(file, "JPEG", subsampling=kind, **options)
    return file.getvalue()


def main(path: str) -> None:
    """Write the file: each size in each kind, at two qualities."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(64):
            height, width = SIZES[number // 4 % 8] if number < 32 else SIZES[-1 - number // 4 % 8]
            data = jpeg(height, width, number)
            member = tarfile.TarInfo(f"{number:02d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    Path(path).write_bytes(gzip.compress(whole.getvalue(), mtime=0))


if __name__ == "__main__":
    main(sys.argv[1])

"""The check of the GPU's JPEG decoder: always the same pixels, and nearly those of the CPU.

torchvision opens nvJPEG without its flag for interpolated chroma, so colours of subsampled JPEGs
differ from libjpeg's at edges (sgl-project/sglang#34163). Their brightness does not, and is
compared where no colour is cut off.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from outcome import Outcome, Setting, judged
from torch import Tensor

from deepclust.data.images import gpu_decode, probes
from deepclust.data.images.decode import decode

CUTS = (64, 7, 1)  # images in a call
MOST, MEAN = 4.0, 0.3  # levels
LUMA = (0.299, 0.587, 0.114)
ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = """
import sys
import torch
from deepclust.data.images.probes import decoder_hash
print(decoder_hash(torch.device(sys.argv[1])))
"""


def decoder(setting: Setting) -> Outcome:
    """Decode the known JPEGs in batches of several sizes and in another process."""
    gpu_decode.check(setting.device)
    cut = {count: decoded(setting.device, count) for count in CUTS}
    hashes = [probes.hash_of(images) for images in cut.values()] + [elsewhere(setting.device)]
    off = differences(cut[CUTS[0]])
    same = len(set(hashes)) == 1
    near = all(most <= MOST and mean < MEAN for name, (most, mean) in off.items() if name != "rgb")
    shown = ", ".join(
        f"{name} {most:.1f} at most, {mean:.3f}" for name, (most, mean) in off.items()
    )
    text = f"one hash in {len(CUTS)} cuts and 2 processes: {same}; levels off the CPU: {shown}"
    return judged(same and near, text, hashes=hashes, off=off)


def decoded(device: torch.device, count: int) -> list[Tensor]:
    """The images, so many in a call."""
    files = probes.encoded()
    parts = [files[first : first + count] for first in range(0, len(files), count)]
    return [image for part in parts for image in gpu_decode.decode_jpegs(part, device)]


def elsewhere(device: torch.device) -> str:
    """The hash that a new process has."""
    command = [sys.executable, "-c", ELSEWHERE, str(device)]
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def differences(images: list[Tensor]) -> dict[str, tuple[float, float]]:
    """The largest and the mean difference to the CPU, in levels, of three kinds.

    "whole": JPEGs with as much chroma as luma. "luma": the brightness of the others where no colour
    is cut off. "rgb": all colours of those.
    """
    off: dict[str, list[Tensor]] = {"whole": [], "luma": [], "rgb": []}
    weights = torch.tensor(LUMA)[:, None, None]
    for data, image in zip(probes.probes(), images, strict=True):
        ours, theirs = image.cpu().float(), decode(data).float()
        if not is_subsampled(data):
            off["whole"].append((ours - theirs).abs().flatten())
            continue
        inside = ((torch.stack([ours, theirs]) % 255) != 0).all(1).all(0)
        off["luma"].append(((ours - theirs) * weights).sum(0)[inside].abs())
        off["rgb"].append((ours - theirs).abs().flatten())
    whole = {name: torch.cat(parts) for name, parts in off.items()}
    return {name: (float(one.max()), float(one.mean())) for name, one in whole.items()}


def is_subsampled(data: bytes) -> bool:
    """Whether a JPEG of the probes has less chroma than luma."""
    frame = data.index(b"\xff\xc0")
    return data[frame + 9] == 3 and data[frame + 11] != 0x11

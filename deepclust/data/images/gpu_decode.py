"""JPEGs decoded on a GPU, a batch in one call, and what becomes of one that the GPU refuses.

torchvision's nvJPEG decoder is called by its registered op, as in `decode.py`. Its pixels differ
from the CPU's by a few levels. At edges of colours they differ more where a JPEG has less chroma
than luma, which it does not interpolate (sgl-project/sglang#34163).

If a batch fails its images are decoded one by one. One that fails alone is decoded by the CPU, so
it touches no other. An error of the GPU itself is raised, since no image is to blame. Pixels must
not depend on how much memory is free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
import torchvision  # registers torch.ops.image
from jaxtyping import Int64, UInt8
from torch import Tensor

from deepclust.data.images.decode import DecodeError, decode
from deepclust.data.images.device_crops import Jpeg, Packed, crop
from deepclust.data.images.headers import Size
from deepclust.errors import ResourceError

_RGB = 3  # torchvision.io.ImageReadMode.RGB
ARENA = 2**29  # bytes of pixels that are decoded at a time, if an image has fewer
_LACKS_MEMORY = re.compile(r"out of memory|: 5$")  # NVJPEG_STATUS_ALLOCATOR_FAILURE
_OF_CARD = re.compile(r"CUDA error|CUDA stream|nvjpegGetProperty|initialize nvjpeg|create")
Decoded: TypeAlias = "UInt8[Tensor, '3 h w'] | str"  # or why there is none


@dataclass(frozen=True)
class Encoded:
    """The JPEGs of a batch that are still to be decoded.

    A line of `table` has the row in the batch, the file's place in `data` (from, to), and its size
    (height, width). The last number is where its pixels begin among those decoded together.
    """

    data: UInt8[Tensor, " bytes"]
    table: Int64[np.ndarray, "m 6"]

    @classmethod
    def of(cls, images: Sequence[Tensor | Jpeg]) -> Encoded:
        """Return the JPEGs among a batch's images."""
        rows = [row for row, image in enumerate(images) if isinstance(image, Jpeg)]
        files = [image for image in images if isinstance(image, Jpeg)]
        ends = np.cumsum([0, *(len(one.data) for one in files)])
        starts = _starts([one.pixels for one in files])
        sides = [one.size for one in files]
        columns = (rows, ends[:-1], ends[1:], *zip(*sides, strict=True)) if rows else ([],) * 5
        table = np.array([*columns, starts], np.int64).T.reshape(-1, 6)
        whole = bytearray(b"".join(one.data for one in files) or b"\0")
        return cls(torch.frombuffer(whole, dtype=torch.uint8), table)

    @property
    def starts(self) -> dict[int, int]:
        """Where the pixels of each row begin."""
        return {int(line[0]): int(line[5]) for line in self.table}

    def groups(self, count: int) -> list[tuple[range, Encoded]]:
        """Cut a batch of `count` rows into those that are decoded together, in order."""
        first = np.flatnonzero(self.table[:, 5] == 0).tolist() or [0]
        cuts = [0, *(int(self.table[i, 0]) for i in first[1:]), count]
        parts = np.split(self.table, first[1:])
        return [
            (range(a, b), replace(self, table=part))
            for a, b, part in zip(cuts, cuts[1:], parts, strict=False)
        ]

    def files(self) -> list[UInt8[Tensor, " bytes"]]:
        """Return each file's bytes."""
        return [self.data[line[1] : line[2]] for line in self.table.tolist()]

    def sizes(self) -> list[Size]:
        """Return each image's size, by its header."""
        return [Size(line[3], line[4]) for line in self.table.tolist()]


def check(device: torch.device | None) -> torch.device:
    """Return the device that decodes JPEGs, by default the present GPU.

    Raises `ResourceError` for anything but a GPU, or a torchvision without the decoder.
    """
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is None or device.type != "cuda":
        raise ResourceError(
            "data.decode=gpu decodes JPEGs on the GPU of the backbone, and there is none here: run "
            "it where torch sees a GPU, or begin a new run with data.decode=cpu. Exported weights "
            "take images that the CPU decodes"
        )
    if not hasattr(torch.ops.image, "decode_jpegs_cuda"):
        raise _no_decoder("its op decode_jpegs_cuda is missing")
    return device


def decode_jpegs(
    files: Sequence[UInt8[Tensor, " bytes"]], device: torch.device
) -> list[UInt8[Tensor, "3 h w"]]:
    """Return the images of JPEG files (tensors of the CPU) on the GPU, decoded in one call.

    Raises `RuntimeError` if one of them cannot be decoded.
    """
    # the op allocates on this stream and writes on another one, which does not wait for this: what
    # is done here with memory that it is given again must be over
    torch.cuda.current_stream(device).synchronize()
    images: list[Tensor] = torch.ops.image.decode_jpegs_cuda(list(files), _RGB, device)
    return images


def decode_each(
    files: Sequence[UInt8[Tensor, " bytes"]], sizes: Sequence[Size], device: torch.device
) -> list[Decoded]:
    """Return the image of every file on the device, or the reason why it has none.

    Raises `ResourceError` where the GPU has failed, and not an image.
    """
    try:
        images = decode_jpegs(files, device)
        if [tuple(image.shape) for image in images] == [(3, *size) for size in sizes]:
            return list(images)
    except RuntimeError as error:
        _raise_if_of_card(error)
    if len(files) == 1:
        return [_by_cpu(files[0], sizes[0], device)]
    return [decode_each([file], [size], device)[0] for file, size in zip(files, sizes, strict=True)]


def decoded_crops(
    packed: Sequence[Packed], encoded: Encoded, device: torch.device
) -> tuple[list[UInt8[Tensor, "b 3 s s"]], list[tuple[int, str]]]:
    """Return a batch's crops, made on the device, and the rows without an image, which are black.

    `packed` says how each kind of crop is cut, and has what was decoded already.
    """
    sent, failed = [one.to(device) for one in packed], list[tuple[int, str]]()
    parts: list[list[Tensor]] = [[] for _ in sent]
    for rows, part in encoded.groups(len(packed[0].places)):
        pixels, refused = _pixels(part, device)
        for crops, one in zip(parts, sent, strict=True):
            crops.append(crop(one.part(rows, pixels)))
        failed += refused
    made = [crops[0] if len(crops) == 1 else torch.cat(crops) for crops in parts]
    for whole in made:
        for row, _ in failed:
            whole[row].zero_()
    return made, failed


def _pixels(
    encoded: Encoded, device: torch.device
) -> tuple[list[UInt8[Tensor, " bytes"]], list[tuple[int, str]]]:
    """Return the pixels of all images one after the other, and the rows that have none, why."""
    if not len(encoded.table):
        return [], []
    rows, sizes = encoded.table[:, 0].tolist(), encoded.sizes()
    images = decode_each(encoded.files(), sizes, device)
    failed = [(row, one) for row, one in zip(rows, images, strict=True) if isinstance(one, str)]
    return [
        torch.zeros(3 * size.height * size.width, dtype=torch.uint8, device=device)
        if isinstance(image, str)
        else image.reshape(-1)
        for image, size in zip(images, sizes, strict=True)
    ], failed


def _starts(pixels: list[int]) -> list[int]:
    """Return where each image begins among those decoded with it: 0 where a group begins."""
    starts, end = [], 0
    for count in pixels:
        end = 0 if end + count > ARENA else end
        starts.append(end)
        end += count
    return starts


def _by_cpu(file: UInt8[Tensor, " bytes"], size: Size, device: torch.device) -> Decoded:
    try:
        image = decode(file.numpy().data)
    except DecodeError as error:
        return str(error)
    if image.shape[1:] != tuple(size):
        return f"decoded as {tuple(image.shape[1:])}, and its header says {tuple(size)}"
    return image.contiguous().to(device)


def _raise_if_of_card(error: RuntimeError) -> None:
    """Raise what no image is to blame for: a lack of memory, a GPU or a build that fails."""
    text = str(error).split("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or _LACKS_MEMORY.search(text):
        raise ResourceError(
            f"no GPU memory for decoded images ({text}): lower train.batch or data.extract_batch"
        ) from error
    if "not compiled" in text:
        raise _no_decoder(text) from error
    if _OF_CARD.search(text):
        raise ResourceError(f"the GPU's JPEG decoder failed: {text}. Look at the GPU") from error


def _no_decoder(why: str) -> ResourceError:
    return ResourceError(
        f"data.decode=gpu: torchvision {torchvision.__version__} cannot decode on a GPU ({why}). "
        f"Install the CUDA build that belongs to torch {torch.__version__}, or begin a new run "
        "with data.decode=cpu"
    )

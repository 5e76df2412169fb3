"""What a decoder makes of known JPEGs, as a hash: two decoders with one hash give equal pixels.

The JPEGs are in `probes.tar.gz`: patterns of many sizes, qualities and subsamplings, all of which a
GPU decodes. They are kept as bytes, since an encoder is not the same everywhere
(`tools/gpu_check/make_probes.py`).
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from functools import cache
from importlib import resources

import torch
import torchvision
from torch import Tensor

from deepclust.data.images import gpu_decode
from deepclust.errors import ResourceError

FILE = "probes.tar.gz"


@cache
def probes() -> tuple[bytes, ...]:
    """Return the JPEGs, in the order of their names."""
    packed = (resources.files("deepclust.data.images") / FILE).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        members = sorted(tar.getmembers(), key=lambda member: member.name)
        files = [tar.extractfile(member) for member in members]
        return tuple(file.read() for file in files if file is not None)


def encoded() -> list[Tensor]:
    """Return the JPEGs as tensors uint8 [bytes] of the CPU."""
    return [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in probes()]


def hash_of(images: Sequence[Tensor]) -> str:
    """Return the hash of decoded images uint8 [3, h, w], their shapes and pixels, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(repr(tuple(image.shape)).encode())
        digest.update(image.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def decoder_hash(device: torch.device) -> str:
    """Return the hash of what a GPU makes of the JPEGs, in one call.

    Raises `ResourceError` where it decodes none.
    """
    try:
        return hash_of(gpu_decode.decode_jpegs(encoded(), device))
    except RuntimeError as error:
        raise ResourceError(
            f"data.decode=gpu: {name_of(device)} does not decode JPEGs ({error}). Install the "
            f"torchvision that belongs to torch {torch.__version__} and this card, or begin a new "
            "run with data.decode=cpu"
        ) from error


def name_of(device: torch.device) -> str:
    """Return what decodes there, for people: the library and the card."""
    card = torch.cuda.get_device_name(device)
    return f"torchvision {torchvision.__version__}, CUDA {torch.version.cuda}, {card}"

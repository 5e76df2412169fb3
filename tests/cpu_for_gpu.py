"""The CPU's decoder and crops where a GPU's would be, for runs on the pretended device.

Everything between the two is the product's: what is read, packed, sent, decoded in one call and
replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from deepclust.data.images import crop_kernel, gpu_decode
from deepclust.data.images.device_crops import Packed, crop

Decode = Callable[[Sequence[Tensor], torch.device], list[Tensor]]


def decode_by_cpu(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """What the GPU's decoder gives, with the CPU's pixels; a batch with a bad file fails whole."""
    assert device.type == "cuda"
    images = [torch.ops.image.decode_jpeg(file, 3, False).contiguous() for file in files]
    return [image.to(device) for image in images]


def crop_by_cpu(packed: Packed) -> Tensor:
    """What the kernel gives, by its definition."""
    assert packed.pixels.is_cuda
    return crop(packed.each(lambda part: part.cpu())).to("cuda")


@contextlib.contextmanager
def cpu_for_gpu(decode: Decode = decode_by_cpu) -> Iterator[None]:
    """Let `decode` be the decoder of the card."""
    with (
        patch.object(gpu_decode, "decode_jpegs", decode),
        patch.object(crop_kernel, "crop_by_triton", crop_by_cpu),
    ):
        yield

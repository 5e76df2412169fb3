"""Modules of normalised images as programs of ONNX and torch.export, any number in a batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

INPUT = "images"
FACTS = "deepclust.json"  # in a program of torch.export
OPSET = 18

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Traced:
    """What is written: a module in eval mode on the CPU, its images, outputs and description."""

    module: nn.Module
    size: int
    outputs: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def example(self) -> Float[Tensor, "2 3 s s"]:
        """Two images, from which the batch is generalised."""
        return torch.zeros(2, 3, self.size, self.size)


def write_onnx(traced: Traced, path: Path) -> None:
    """Write one file; its facts are JSON texts in the metadata."""
    import onnx

    program = torch.onnx.export(
        traced.module, (traced.example,), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=[INPUT], output_names=[*traced.outputs], dynamic_shapes=_any_batch(),
    )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for key, value in {**traced.facts, "size": traced.size}.items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=json.dumps(value)))
    path.write_bytes(model.SerializeToString())


def read_onnx(path: Path) -> Callable[[Tensor], Outputs]:
    """Return the outputs of a file of ONNX by its own runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {INPUT: images.numpy()})))


def write_program(traced: Traced, path: Path) -> None:
    """Write a program of torch.export; its facts are a JSON file inside."""
    program = torch.export.export(traced.module, (traced.example,), dynamic_shapes=_any_batch())
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={FACTS: json.dumps(traced.facts)})


def read_program(path: Path) -> Callable[[Tensor], Outputs]:
    """Return the outputs of a program of torch.export."""
    with path.open("rb") as file:
        module: nn.Module = torch.export.load(file).module()

    def outputs(images: Tensor) -> Outputs:
        given = module(images)
        return (given,) if isinstance(given, Tensor) else tuple(given)

    return outputs


def onnx_usage(path: Path, outputs: tuple[str, ...]) -> str:
    """Return lines that load a file of ONNX."""
    names = ", ".join(outputs)
    call = f'net.run(None, {{"{INPUT}": images}})' + ("[0]" if len(outputs) == 1 else "")
    return (
        f"import onnxruntime\nnet = onnxruntime.InferenceSession({str(path)!r})\n{names} = {call}"
    )


def program_usage(path: Path, outputs: tuple[str, ...]) -> str:
    """Return lines that load a program of torch.export."""
    lines = f"import torch\nnet = torch.export.load({str(path)!r}).module()"
    if path.suffix != ".pt2":  # by its name torch takes such a file too, but with a warning
        opened = f"with open({str(path)!r}, 'rb') as file:"
        lines = f"import torch\n{opened}\n    net = torch.export.load(file).module()"
    return lines if len(outputs) == 1 else f"{lines}\n{', '.join(outputs)} = net(images)"


def _any_batch() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


@dataclass(frozen=True)
class Program:
    """A format of programs: what writes one, what reads it again, and lines that load it."""

    write: Callable[[Traced, Path], None]
    read: Callable[[Path], Callable[[Tensor], Outputs]]
    usage: Callable[[Path, tuple[str, ...]], str]


PROGRAMS = {
    "onnx": Program(write_onnx, read_onnx, onnx_usage),
    "torch-export": Program(write_program, read_program, program_usage),
}

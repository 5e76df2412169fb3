"""Whole runs whose JPEGs a GPU decodes, on the pretended one with the CPU's decoder.

The two decoders are the same there, so a run has the bits of one that decodes on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust import pretrain
from deepclust.data.images import probes
from deepclust.errors import RecipeError, ResourceError, RunDiffersError
from deepclust.files import read_json
from deepclust.launch.start import resume
from deepclust.run.directory import Run, manifest
from tests.cpu_for_gpu import cpu_for_gpu, decode_by_cpu
from tests.forks import in_fork
from tests.images import draw, encode, write_tar
from tests.pretended_device import pretended
from tests.tiny import (
    assert_predicts_its_assignments,
    assert_same_run,
    assignments,
    deepclust,
    tiny_recipe,
)

BROKEN = 7  # a JPEG with a good header that nobody can decode
GPU = ("train.device=cuda", "data.decode=gpu")


def picture(number: int) -> tuple[str, bytes]:
    """JPEGs for the GPU, and some of each kind for the CPU."""
    image = draw(number, 20 + number % 9, 24, number % 4)
    if number % 10 == 3:
        return "png", encode(image, "png")
    data = encode(image, "jpg", quality=80, progressive=number % 10 == 5)
    # without its quantisation tables no decoder can read it
    return "jpg", data.replace(b"\xff\xdb", b"\xff\xfe") if number == BROKEN else data


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled shards of 96 images of several formats, of which one is broken."""
    folder = tmp_path_factory.mktemp("mixed")
    for shard in range(3):
        members = []
        for number in range(32 * shard, 32 * shard + 32):
            suffix, data = picture(number)
            members += [
                (f"{number:04d}.cls", b"%d" % (number % 4)),
                (f"{number:04d}.{suffix}", data),
            ]
        write_tar(folder / f"s-{shard}.tar", members)
    return folder


def run(shards: Path, path: Path, *overrides: str) -> None:
    """A short run on the pretended card."""
    given = ("data.max_bad=0.1", "train.epochs=1", "train.device=cuda", *overrides)
    with pretended(), cpu_for_gpu():
        pretrain(tiny_recipe(shards, *given), path)


def replaced(path: Path) -> list[Any]:
    file = path / "logs" / "replaced.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return sorted((line["step"], line["samples"]) for line in lines)


@pytest.fixture(scope="module")
def by_cpu(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "cpu"
    in_fork(run, mixed, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_has_the_bits_of_the_cpus_with_any_number_of_workers(
    mixed: Path, by_cpu: Path, tmp_path: Path, workers: int
) -> None:
    in_fork(run, mixed, tmp_path / "gpu", "data.decode=gpu", f"data.workers={workers}")
    assert_same_run(tmp_path / "gpu", by_cpu)
    round_ = Run(tmp_path / "gpu").round(0)
    assert set(manifest(round_ / "features")["inputs"]) == {"data", "round", "decode", "decoder"}
    assert assignments(tmp_path / "gpu")[0][0, BROKEN] == -1


@pytest.mark.slow
def test_two_ranks_have_the_bits_of_two_that_decode_on_the_cpu(
    mixed: Path, by_cpu: Path, tmp_path: Path
) -> None:
    for decode in ("cpu", "gpu"):
        in_fork(run, mixed, tmp_path / decode, f"data.decode={decode}", "train.ranks=2")
    assert_same_run(tmp_path / "gpu", tmp_path / "cpu")
    assert np.array_equal(assignments(tmp_path / "gpu")[0], assignments(by_cpu)[0])


@pytest.mark.slow
def test_a_broken_image_has_the_substitute_that_it_has_on_the_cpu(
    mixed: Path, tmp_path: Path
) -> None:
    simclr = ("method.name=simclr", "cluster=null")  # which trains on all samples
    for decode in ("cpu", "gpu"):
        in_fork(run, mixed, tmp_path / decode, f"data.decode={decode}", *simclr)
    assert_same_run(tmp_path / "gpu", tmp_path / "cpu")
    assert replaced(tmp_path / "gpu") == replaced(tmp_path / "cpu") != []


def run_and_predict(shards: Path, folder: Path) -> None:
    run(shards, folder / "run", "data.decode=gpu", "cluster.final=true")
    with pretended(), cpu_for_gpu():
        assert_predicts_its_assignments(folder / "run", shards, folder)


@pytest.mark.slow
def test_new_images_are_decoded_as_those_of_the_run(mixed: Path, tmp_path: Path) -> None:
    in_fork(run_and_predict, mixed, tmp_path)


def one_level_apart(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Another card: its pixels differ by a level."""
    return [image.clamp_max(254) + 1 for image in decode_by_cpu(files, device)]


def run_elsewhere(shards: Path, path: Path) -> list[str]:
    """Begin here, go on on another card, which is accepted, and come back."""
    run(shards, path, "data.decode=gpu")
    began = read_json(path / "data.json")["decoder"]["hash"]
    with pretended():
        with cpu_for_gpu(one_level_apart):
            for _ in range(2):
                with pytest.raises(RunDiffersError) as refused:
                    resume(path, "train.epochs=2")
            resume(path, accept_decoder=True)
            resume(path, "train.epochs=3")
        with cpu_for_gpu(), pytest.raises(RunDiffersError):
            resume(path, "train.epochs=4")
    return [began, read_json(path / "data.json")["decoder"]["hash"], str(refused.value)]


@pytest.mark.slow
def test_another_decoder_is_refused_with_both_named_until_it_is_accepted(
    mixed: Path, tmp_path: Path
) -> None:
    began, now, refused = in_fork(run_elsewhere, mixed, tmp_path / "run")
    assert began != now
    assert began[:12] in refused
    assert now[:12] in refused
    assert f"deepclust resume {tmp_path / 'run'} --accept-decoder" in refused
    events = Run(tmp_path / "run").events()
    assert [e["epochs"] for e in events if e["event"] == "finished"] == [1, 2, 3]
    warnings = [e["text"] for e in events if e["event"] == "warning"]
    (text,) = [text for text in warnings if "accepted" in text]
    assert began[:12] in text
    assert now[:12] in text


def test_without_a_gpu_a_run_ends_before_any_work(mixed: Path, tmp_path: Path) -> None:
    given = tiny_recipe(mixed, "train.device=auto", "data.decode=gpu")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ResourceError, match=r"data\.decode=gpu .*GPU"):
        pretrain(given, tmp_path / "run")
    assert not Run(tmp_path / "run").rounds()
    with pytest.raises(RecipeError, match=r"data\.decode: gpu needs the backbone on a GPU"):
        tiny_recipe(mixed, "train.device=cpu", "data.decode=gpu")
    with pytest.raises(RecipeError, match="decode=gpu makes crops after the workers"):
        tiny_recipe(mixed, *GPU, "data.colour_on=workers")


def test_the_key_stays_what_a_run_began_with(final_run: Path) -> None:
    with pytest.raises(RunDiffersError, match=r"data\.decode: cpu -> gpu"):
        resume(final_run, "data.decode=gpu", "train.device=auto")
    said = deepclust("resume", final_run, "--accept-decoder", code=2).stderr
    assert "--accept-decoder is for runs with data.decode=gpu" in said


def test_the_known_jpegs_are_all_decoded_by_a_gpu_and_a_level_changes_their_hash() -> None:
    images = [torch.ops.image.decode_jpeg(file, 3, False) for file in probes.encoded()]
    assert len(images) == 64
    assert len({tuple(image.shape) for image in images}) == 8
    before = probes.hash_of(images)
    assert before == probes.hash_of(images)
    images[40][0, 0, 0] ^= 1
    assert probes.hash_of(images) != before

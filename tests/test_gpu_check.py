"""`tools/gpu-check` without a GPU: its table, its exit codes, its JSON, and its numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepclust import pretrain
from deepclust.data.images import probes
from tests.cpu_for_gpu import cpu_for_gpu, decode_by_cpu
from tests.gpu_check import FOLDER, modules
from tests.pretended_device import pretended
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The program, with its modules beside it."""
    with modules() as found:
        yield found


def test_without_a_gpu_it_says_so_in_one_sentence_and_ends_with_4(
    tool: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in ([], ["--quick"], ["--only", "4"]):
        assert tool["main"](words) == 4
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("gpu-check: ")
        assert said.err.count("\n") == 1
    words = ["bash", "-n", str(FOLDER.parent / "gpu-check")]
    subprocess.run(words, check=True)


def test_the_table_has_eighteen_checks_of_which_the_quick_ones_are_all_built(tool: Any) -> None:
    checks, quick = tool["CHECKS"], tool["QUICK"]
    assert [check.number for check in checks] == list(range(1, 19))
    assert len({check.name for check in checks}) == 18
    assert all(check.function for check in checks[:quick])
    options = tool["parse"](["--only", "17", "2"])
    assert [check.number for check in tool["chosen"](options)] == [2, 17]
    assert [c.number for c in tool["chosen"](tool["parse"](["--quick"]))] == list(range(1, 10))


@pytest.mark.parametrize(
    ("verdict", "of_some", "of_all"),
    [("pass", 0, 0), ("fail", 1, 1), ("not built", 0, 1), ("not here", 0, 1)],
)
def test_what_is_not_built_counts_only_where_all_are_asked_for(
    tool: Any, verdict: str, of_some: int, of_all: int
) -> None:
    outcomes = [(None, tool["Outcome"](one, "")) for one in ("pass", verdict)]
    assert tool["exit_code"](outcomes, whole=False) == of_some
    assert tool["exit_code"](outcomes, whole=True) == of_all


def test_a_check_that_breaks_is_a_failure_and_the_json_has_all_of_them(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = tool["outcome"].Check

    def breaks(setting: Any) -> Any:
        raise RuntimeError("CUDA error: out of everything\nand more")

    judged = tool["outcome"].judged
    checks = [
        check(1, "good", "", lambda setting: judged(True, "as it should be", share=0.5)),
        check(2, "broken", "", breaks),
        check(3, "later", ""),
    ]
    outcomes = tool["run"](checks, torch.device("cpu"), tmp_path)
    assert [one.verdict for _, one in outcomes] == ["pass", "fail", "not built"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("RuntimeError: CUDA error: out of everything")
    document = json.loads(json.dumps(tool["document"](outcomes)))
    assert document["machine"]["torch"] == torch.__version__
    assert document["checks"][0]["numbers"] == {"share": 0.5}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("search", {"n": 2000, "ks": (4, 260)}),
        ("clusters", {"n": 2000, "k": 20}),
        ("whitening", {"n": 2000, "wide": 64, "dim": 16}),
        ("views", {"count": 8}),
    ],
)
def test_the_checks_of_numbers_pass_where_the_device_is_the_cpu_itself(
    tool: Any, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    setting = tool["Setting"](torch.device("cpu"), tmp_path)
    outcome = getattr(tool["agreement"], name)(setting, **options)
    assert outcome.verdict == "pass", outcome


def test_the_check_of_waits_passes_where_the_device_is_the_cpu_itself(
    tool: Any, tmp_path: Path
) -> None:
    setting = tool["Setting"](torch.device("cpu"), tmp_path)
    outcome = tool["waits"].waits(setting, ["deepcluster", "daino"])
    assert outcome.verdict == "pass", outcome


def test_no_step_batch_or_pass_waits_more_often_than_the_table_says(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def counted(device: torch.device) -> Iterator[list[str]]:
        seen: list[str] = []
        log.waits.clear()
        with log.within("asked"):
            yield seen
        seen += [where for (phase, where) in log.waits.elements() if phase == "asked"]

    monkeypatch.setattr(tool["waits"], "counted", counted)
    with pretended() as log:
        setting = tool["Setting"](torch.device("cuda", 0), tmp_path)
        some = ["deepcluster", "dino", "supervised"]  # all are in `waits.json` by the run
        assert tool["waits"].waits(setting, some).verdict == "pass"
        monkeypatch.setattr(tool["waits"], "TABLE", tmp_path / "table.json")
        (tmp_path / "table.json").write_text("{}")
        outcome = tool["waits"].waits(setting, ["deepercluster", "daino"])
    parts = ("step", "batch of extraction", "pass of k-means")
    assert list(outcome.numbers["more"]) == [f"{part} of deepercluster" for part in parts]


def test_gradients_of_float32_parts_are_compared_with_float64(tool: Any, tmp_path: Path) -> None:
    outcome = tool["agreement"].gradients(tool["Setting"](torch.device("cpu"), tmp_path))
    assert outcome.numbers["nt_xent"] < 1e-5
    assert outcome.numbers["centroids"] < 1e-5


def test_the_checks_of_speed_measure_a_step_and_its_readers(tool: Any, tmp_path: Path) -> None:
    setting, small = tool["Setting"](torch.device("cpu"), tmp_path), [("conv4", 8)]
    outcome = tool["speed"].step_speed(setting, small, size=16, steps=2)
    assert outcome.numbers["conv4"] > 0
    outcome = tool["speed"].feeding(setting, count=64, network="conv4", size=16, batch=16)
    assert 0 <= outcome.numbers["waiting"] <= 1


@pytest.mark.parametrize(("off", "verdict"), [(0, "pass"), (3, "fail")])
def test_the_check_of_the_decoder_compares_cuts_processes_and_the_cpu(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: int, verdict: str
) -> None:
    def decode(files: Any, device: torch.device) -> list[torch.Tensor]:
        return [image.clamp_max(255 - off) + off for image in decode_by_cpu(files, device)]

    check = tool["decoder"]
    monkeypatch.setattr(check, "elsewhere", probes.decoder_hash)
    with pretended(), cpu_for_gpu(decode):
        outcome = check.decoder(tool["Setting"](torch.device("cuda", 0), tmp_path))
    assert outcome.verdict == verdict
    assert len(set(outcome.numbers["hashes"])) == 1
    assert outcome.numbers["off"]["whole"][0] == outcome.numbers["off"]["rgb"][0] == off


def test_the_check_of_the_decoder_notes_an_image_that_depends_on_its_batch(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(files: Any, device: torch.device) -> list[torch.Tensor]:
        return [image ^ (len(files) == 7) for image in decode_by_cpu(files, device)]

    monkeypatch.setattr(tool["decoder"], "elsewhere", probes.decoder_hash)
    with pretended(), cpu_for_gpu(decode):
        outcome = tool["decoder"].decoder(tool["Setting"](torch.device("cuda", 0), tmp_path))
    assert outcome.verdict == "fail"
    assert len(set(outcome.numbers["hashes"])) == 2


def test_the_check_of_kmeans_gives_a_pass_20_iterations_and_the_share_of_the_peak(
    tool: Any, tmp_path: Path
) -> None:
    setting = tool["Setting"](torch.device("cpu"), tmp_path)
    outcome = tool["jobs"].kmeans_speed(setting, n=2000, k=20)
    assert outcome.numbers["iterations_s"] > outcome.numbers["seconds"] > 0
    assert outcome.numbers["share_of_peak"] > 0
    assert "20 iterations" in outcome.text


def test_the_check_of_a_refresh_runs_the_bench_on_its_device(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [{"device": "cuda:1", "stages": [{"stage": "moments", "seconds": 1.5}]}]

    def bench(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[command.index("--device") + 1] == "cuda:1"
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"runs": runs}))
        return SimpleNamespace(stdout="", stderr="")

    monkeypatch.setattr(tool["jobs"].subprocess, "run", bench)
    setting = tool["Setting"](torch.device("cuda", 1), tmp_path)
    outcome = tool["jobs"].refresh(setting)
    assert (outcome.verdict, outcome.numbers) == ("pass", {"seconds": {"moments": 1.5}})
    runs[0] = {"error": "exit code 1"}
    assert tool["jobs"].refresh(setting).verdict == "fail"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("search", {"n": 20_000, "ks": (4, 260, 3332)}),
        ("clusters", {"n": 20_000, "k": 100}),
        ("whitening", {}),
        ("gradients", {}),
        ("views", {"count": 50}),
    ],
)
def test_a_gpu_has_the_numbers_of_the_cpu(
    tool: Any, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    setting = tool["Setting"](torch.device("cuda", 0), tmp_path)
    outcome = getattr(tool["agreement"], name)(setting, **options)
    assert outcome.verdict == "pass", outcome


@pytest.mark.gpu
def test_a_short_run_on_a_gpu_ends_with_weights_and_without_a_fallback(
    shards: Path, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run = pretrain(tiny_recipe(shards, "train.device=cuda", "train.epochs=1"), tmp_path / "run")
    assert (run.path / "export" / "backbone.safetensors").exists()
    texts = [event.get("text", "") for event in run.events()]
    assert not [text for text in texts if "instead" in text]

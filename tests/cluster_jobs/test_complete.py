"""The shell's completion, asked as bash asks it: recipes, keys, runs and guides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster_jobs.cli import complete


def offered(*words: str) -> list[str]:
    """What bash is offered for the last word of `deepclust WORDS`, in a new process."""
    line = ["deepclust", *words]
    variables = {
        "_DEEPCLUST_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }
    code = "import sys; sys.argv = ['deepclust']; from cluster_jobs.cli import app; "
    code += "app(prog_name='deepclust')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "one", "start"),
    [
        (("pret",), "pretrain", "pret"),
        (("pretrain", "swav-"), "swav-fashion", "swav-"),
        (("pretrain", "dino-fashion", "--run", "x", "train.ep"), "train.epochs=", "train.ep"),
        (("recipe", "dino-fashion", "method."), "method.prototypes=", "method."),
        (("guide", "ra"), "ray", "ra"),
        (("guide", "ch"), "changelog", "ch"),
        (("list", "k"), "keys", "k"),
    ],
)
def test_bash_is_offered_what_can_follow(words: tuple[str, ...], one: str, start: str) -> None:
    found = offered(*words)
    assert one in found
    assert all(word.startswith(start) for word in found)


def test_runs_and_folders_of_runs_are_offered(
    final_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "more").mkdir(parents=True)
    (tmp_path / "runs" / "mine").symlink_to(final_run)
    (tmp_path / "runs" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert complete.runs("r") == ["runs/"]
    assert complete.runs("runs/m") == ["runs/mine", "runs/more/"]
    assert complete.runs(f"{tmp_path}/runs/mi") == [f"{tmp_path}/runs/mine"]
    assert complete.runs("gone/") == []

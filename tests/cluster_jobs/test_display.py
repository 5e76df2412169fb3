"""What a run in the foreground shows where there is no terminal: plain lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster_jobs.display import MANY, ROUND_COLUMNS, Display, round_table, status_table
from cluster_jobs.status import Status
from cluster_jobs.terminal import recorded_command


@pytest.mark.parametrize(("round", "words"), [(2, "train, round 2: 3/12"), (-1, "train: 3/12")])
def test_a_method_without_rounds_shows_none(round: int, words: str) -> None:
    output = io.StringIO()
    with Display(Console(file=output, width=200)) as display:
        display({"progress": True, "round": round, "done": 3, "of": 12, "loss": 1.0,
                 "images_per_s": 9.0, "waiting": 0.1})  # fmt: skip
    assert output.getvalue().startswith(words)


def shown(*records: dict[str, object]) -> str:
    screen = io.StringIO()
    with Display(Console(file=screen, width=200)) as display:
        for record in records:
            display({"progress": True, **record})
    return screen.getvalue()


@pytest.mark.parametrize(("best", "words"), [(40, "the best so far"), (20, "the best is step 20")])
def test_an_evaluation_says_its_score_and_the_best(best: int, words: str) -> None:
    record = {"event": "evaluated", "step": 40, "epoch": 2.0, "round": 1, "top1": 0.5, "best": best}
    screen = io.StringIO()
    with Display(Console(file=screen, width=200)) as display:
        display(record)
    assert screen.getvalue() == f"epoch 2: kNN top-1 50.0% · {words}\n"


@pytest.mark.parametrize("installed", [True, False])
def test_a_notebook_draws_a_bar_where_it_has_widgets_and_else_lines(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    here = "cluster_jobs.display"  # any module stands for ipywidgets
    monkeypatch.setattr("cluster_jobs.display.WIDGETS", here if installed else "not_there_at_all")
    display = Display(Console(file=io.StringIO(), force_jupyter=True))
    assert display.draws_a_bar is installed


def test_any_stage_shows_how_far_it_is() -> None:
    record = {"stage": "cluster", "round": 3, "done": 4, "of": 20, "inertia": 0.51234567}
    text = shown({**record, "moved": 1234, "eta": 3725.0})
    assert text == "cluster, round 3: 4/20 inertia 0.51235 · 1,234 moved · 1 h 2 min left\n"


def test_plain_lines_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0, 105.0, 111.0, 111.0])
    monkeypatch.setattr("cluster_jobs.display.time.monotonic", lambda: next(clock))
    records = [{"stage": "extract", "done": done, "of": 9} for done in (1, 2, 3)]
    assert shown(*records) == "extract: 1/9 \nextract: 3/9 \n"


def test_a_record_without_a_count_shows_nothing() -> None:
    assert shown({"stage": "cluster", "alive": True}) == ""


def test_a_long_line_in_a_file_is_not_folded():
    output = io.StringIO()
    with Display(Console(file=output, width=20)) as display:
        display({"event": "warning", "text": "a long line " * 9})
    assert output.getvalue().count("\n") == 1


def test_a_recorded_command_can_be_typed_again_and_tells_no_secret() -> None:
    words = ["/venv/bin/deepclust", "pretrain", "r.yaml", "train.evaluate=1 epoch"]
    assert recorded_command(words) == "deepclust pretrain r.yaml 'train.evaluate=1 epoch'"
    assert "letmein" not in str(recorded_command([*words, "notify.webhook=https://h/letmein"]))
    assert [recorded_command(one) for one in (None, 3, [], ["d"], ["d", 3])] == [None] * 5


@pytest.mark.parametrize("name", ["run", "[red]run", "\u8d70run"])
def test_the_table_of_many_runs_has_a_line_for_each_with_every_cell(name: str) -> None:
    states = [Status(f"{name}{n}", "RUNNING", "train", 8, epoch=n / 8) for n in range(MANY + 1)]
    out = io.StringIO()
    Console(file=out, width=200).print(status_table(states, 200))
    lines = out.getvalue().splitlines()
    assert len(lines) == len(states) + 1
    assert lines[0].split()[:4] == ["run", "state", "phase", "round"]
    assert lines[9].split() == [f"{name}8", "RUNNING", "train", "1.0", "of", "8"]


def test_names_that_do_not_fit_are_folded_and_not_cut() -> None:
    states = [Status("x" * 300, "RUNNING", "train", 8) for _ in range(MANY + 1)]
    out = io.StringIO()
    Console(file=out, width=80).print(status_table(states, 80))
    assert out.getvalue().count("x") == 300 * (MANY + 1)


def test_the_table_of_rounds_is_not_cut_at_80_columns() -> None:
    numbers = dict.fromkeys(ROUND_COLUMNS, 123456.789) | {"round": 12}
    out = io.StringIO()
    Console(file=out, width=80).print(round_table([numbers]))
    assert "\u2026" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80

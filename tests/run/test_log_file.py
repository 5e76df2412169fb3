"""A log on a storage that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from deepclust.run.reporting import AppendingHandler


def test_a_log_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = AppendingHandler(tmp_path / "a.log")
    full = open("/dev/full", "w")  # noqa: SIM115 - its last line cannot be written, also at close
    handler.stream.close()
    handler.stream = full
    handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "text", None, None))
    handler.close()
    assert capsys.readouterr().err == ""

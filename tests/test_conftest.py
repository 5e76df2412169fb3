"""With DEEPCLUST_TEST_INSTALL=1 no test is left out unseen; without, skipping is skipping."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_passes(): pass

@pytest.mark.xfail
def test_is_expected_to_fail(): assert False

def test_skips(): pytest.skip("no data")

@pytest.mark.skip(reason="not today")
def test_is_skipped(): pass

@pytest.mark.gpu
def test_of_a_gpu(): pytest.skip("no GPU")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors"), ("", "1 passed, 4 skipped")],
    ids=["in CI", "at home"],
)
def test_a_skipped_test_fails_where_everything_can_be_installed(
    tmp_path: Path, value: str, expected: str
) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('nothing_here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--continue-on-collection-errors"],
        cwd=tmp_path, env={**os.environ, "DEEPCLUST_TEST_INSTALL": value},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert expected in done.stdout
    assert ("allows no skipped test" in done.stdout) == (value == "1")
    assert ("no data" in done.stdout) == (value == "1")

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepclust.errors import RunHeldError
from deepclust.files import read_json, write_json
from deepclust.run import lock
from deepclust.run.directory import Run
from deepclust.run.lock import check_token, hold, owner, renew

HOLDER = "import sys, time; from deepclust.run.lock import hold; from pathlib import Path\n"
HOLDER += "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def holder(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_controller_is_refused_with_the_owners_name(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(RunHeldError, match=f"process {process.pid} on"), hold(tmp_path):
            pass
        process.kill()


def test_the_lock_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
    assert owner(tmp_path) is None
    with hold(tmp_path) as token:
        check_token(tmp_path, token)


def test_a_lock_that_lost_a_key_is_free_when_its_process_is_dead(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        written = read_json(tmp_path / "lock.json")
        del written["started"]
        write_json(tmp_path / "lock.json", written)
        assert owner(tmp_path) is not None
        process.kill()
    assert owner(tmp_path) is None


def test_a_process_with_a_reused_pid_does_not_own_the_lock(tmp_path: Path) -> None:
    with hold(tmp_path):
        written = read_json(tmp_path / "lock.json")
        write_json(tmp_path / "lock.json", {**written, "started": "1"})
        assert owner(tmp_path) is None


def test_a_writer_whose_lock_was_taken_over_is_fenced_off(tmp_path: Path) -> None:
    with hold(tmp_path) as token:
        written = read_json(tmp_path / "lock.json")
        write_json(tmp_path / "lock.json", {**written, "host": "b", "token": "another"})
        with pytest.raises(RunHeldError, match="taken over"):
            check_token(tmp_path, token)
    assert (tmp_path / "lock.json").exists()  # the other's lock is not ours to remove


def test_a_renewed_token_fences_off_the_old_one(tmp_path: Path) -> None:
    with hold(tmp_path) as token:
        fresh = renew(tmp_path, token)
        check_token(tmp_path, fresh)
        with pytest.raises(RunHeldError, match="taken over"):
            check_token(tmp_path, token)
        with pytest.raises(RunHeldError, match="taken over"):
            renew(tmp_path, token)
    assert not (tmp_path / "lock.json").exists()


def test_a_lock_of_another_host_goes_stale_with_its_heartbeat(tmp_path: Path) -> None:
    with hold(tmp_path):
        written = read_json(tmp_path / "lock.json")
        write_json(tmp_path / "lock.json", {**written, "host": "elsewhere"})
        assert "elsewhere" in str(owner(tmp_path))
        old = os.stat(tmp_path / "lock.json").st_mtime - 2 * lock.STALE_AFTER_S
        os.utime(tmp_path / "lock.json", (old, old))
        assert owner(tmp_path) is None


def test_the_lock_is_gone_after_the_block(tmp_path: Path) -> None:
    with hold(tmp_path):
        assert owner(tmp_path)
    assert not (tmp_path / "lock.json").exists()


def test_a_lock_of_an_earlier_restart_of_the_same_job_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPCLUST_JOB", "7")
    with hold(tmp_path):
        assert lock.owner_job(tmp_path) == "7"
        with pytest.raises(RunHeldError, match=", job 7"), hold(tmp_path):
            pass
        monkeypatch.setenv("DEEPCLUST_RESTART", "1")
        with hold(tmp_path):
            monkeypatch.delenv("DEEPCLUST_RESTART")
            with pytest.raises(RunHeldError), hold(tmp_path):  # the old one does not come back
                pass


def test_the_lock_of_an_older_version_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(tmp_path):
        written = read_json(tmp_path / "lock.json")
        old = {key: value for key, value in written.items() if key not in ("job", "restart")}
        old |= {"host": "elsewhere", "slurm_job": "7", "slurm_restart": None}
        write_json(tmp_path / "lock.json", old)
        assert lock.owner_job(tmp_path) == "7"
        monkeypatch.setenv("DEEPCLUST_JOB", "7")
        monkeypatch.setenv("DEEPCLUST_RESTART", "1")
        assert owner(tmp_path) is None


def test_a_controller_that_was_fenced_off_writes_no_event(tmp_path: Path) -> None:
    with hold(tmp_path) as token:
        run = Run(tmp_path, token)
        run.event("started", pid=1, ranks=1)
        renew(tmp_path, token)
        with pytest.raises(RunHeldError, match="taken over"):
            run.event("stopped")
    assert [event["event"] for event in run.events()] == ["started"]

from __future__ import annotations

import ast
import errno
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from deepclust import files
from deepclust.errors import DataError, DiskError
from deepclust.files import (
    append_json,
    atomic_file,
    atomic_folder,
    create_empty,
    disk_errors,
    file_hash,
    read_json,
    read_jsonl,
    read_record,
    set_aside,
    target_of,
    write_json,
)
from tests.forks import in_fork


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    with pytest.raises(DiskError, match="gone"), atomic_file(target) as partial:
        partial.with_suffix(".gone").read_text()
    assert read_json(target) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_the_fence_refuses_does_not_appear(tmp_path: Path) -> None:
    def refuse() -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        atomic_folder(tmp_path / "stage", lambda folder: (folder / "x").touch(), refuse)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_a_disk_error_that_names_the_path(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match=r"(?s)stage.*Free some space"),
        disk_errors(tmp_path / "stage"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append_json(file, {"a": 1})
    with open(file, "a") as out:
        out.write('{"b":')
    assert read_jsonl(file) == [{"a": 1}]


def test_the_hash_depends_on_every_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    before = file_hash(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"x" * 99_999 + b"y")
    assert file_hash(tmp_path / "a") != before


@pytest.mark.parametrize("what", ["pipe", "folder", "socket", "device", "dangling", "circle"])
def test_a_file_to_write_replaces_nothing_but_a_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "out"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif what == "device":
        path = Path("/dev/null")
    else:
        path.symlink_to(tmp_path / "nothing" if what == "dangling" else path)
    with pytest.raises(DiskError, match=str(path)):
        target_of(path)


def test_the_end_of_a_link_is_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "one").symlink_to("real")
    (tmp_path / "two").symlink_to("one")
    assert target_of(tmp_path / "two") == tmp_path / "real"
    assert target_of(tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_nothing_is_appended_through_a_link_or_into_a_pipe(tmp_path: Path, what: str) -> None:
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "events.jsonl"
    path.symlink_to("precious") if what == "link" else os.mkfifo(path)
    with pytest.raises(DiskError, match=r"events\.jsonl"):
        append_json(path, {"a": 1})
    with pytest.raises(DiskError, match=r"events\.jsonl"):
        create_empty(path)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "number",
    [
        "EEXIST",
        "ENOENT",
        "ENAMETOOLONG",
        "ELOOP",
        "ESTALE",
        "EIO",
        "EROFS",
        "EACCES",
        "ENOTDIR",
        "EISDIR",
        "EPERM",
        "EDQUOT",
        "ENOSPC",
        "ETXTBSY",
        "EFBIG",
        "ENXIO",
    ],
)
def test_whatever_the_system_says_against_a_file_names_it(number: str) -> None:
    code = getattr(errno, number)
    with pytest.raises(DiskError, match="/x/y") as caught, disk_errors(Path("/other")):
        raise OSError(code, os.strerror(code), "/x/y")
    assert caught.value.exit_code == 5


def test_a_name_that_is_too_long_or_below_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "below", tmp_path / "y" / ("x" * 300)):
        with pytest.raises(DiskError):
            write_json(path, {})
        with pytest.raises(DiskError):
            append_json(path, {})


@pytest.mark.parametrize("text", ["", "{", "[" * 99_999, "9" * 9999, '"\udcff', "\0"])
def test_what_is_no_json_is_a_data_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(file)


def test_a_missing_huge_or_special_file_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "folder", "huge", "missing"):
        with pytest.raises(DataError, match=name):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["[]", "1", "null", '{"a": "x"}', '{"a": true}', "{}", '{"a": 1e1}']
)
def test_a_record_without_its_fields_is_a_data_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json"):
        read_record(tmp_path / "a.json", {"a": int})


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    lines = ['{"a": 1}', "12", "[]", "null", "[" * 99_999, "\udcff", "9" * 9999, '{"b": 2}']
    data = "\n".join(lines).encode("utf-8", "surrogateescape")
    (tmp_path / "e.jsonl").write_bytes(data)
    assert read_jsonl(tmp_path / "e.jsonl") == [{"a": 1}, {"b": 2}]


def test_names_that_are_no_utf8_come_back_as_they_were(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "caf\udce9 é"})
    append_json(tmp_path / "b.jsonl", {"name": "caf\udce9 é"})
    assert read_json(tmp_path / "a.json") == {"name": "caf\udce9 é"}
    assert read_jsonl(tmp_path / "b.jsonl") == [{"name": "caf\udce9 é"}]


def test_a_folder_is_set_aside_under_a_free_name(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "0001").mkdir()
        set_aside(tmp_path / "0001", "damaged")
    names = ["damaged-0001", "damaged-0001-2", "damaged-0001-3"]
    assert sorted(os.listdir(tmp_path)) == names


# Where few kinds of errors are caught around a file, and why no other kind can come.
SHORT_LISTS: dict[str, str] = {}


def test_no_list_of_errors_is_too_short_where_files_are_read() -> None:
    """JSON, NumPy, Parquet and safetensors raise what they like: `reading` catches all of it."""
    root = Path(files.__file__).parents[1]
    short = []
    owned = ["deepclust/run", "deepclust/recipe", "deepclust/stages", "deepclust/files.py"]
    owned += ["deepclust/launch/start.py", "cluster_jobs/status.py", "cluster_jobs/job_file.py"]
    for path in owned:
        for file in [root / path] if path.endswith(".py") else sorted((root / path).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Try) and _reads(node) and not _is_complete(node):
                    short.append(f"{file.relative_to(root)}:{node.lineno}")
    allowed = tuple(SHORT_LISTS)
    assert [one for one in short if not one.startswith(allowed)] == []


def _reads(block: ast.Try) -> bool:
    """Whether the body calls a library that reads a file."""
    calls = [n.func for part in block.body for n in ast.walk(part) if isinstance(n, ast.Call)]
    names = {getattr(f, "attr", getattr(f, "id", "")) for f in calls}
    return bool(names & {"load", "load_file", "safe_open", "read_table", "safe_load", "loads"})


def _is_complete(block: ast.Try) -> bool:
    """Whether it catches all errors, or only those that the reading door makes of them."""
    kinds = {ast.unparse(handler.type) if handler.type else "" for handler in block.handlers}
    return bool(kinds & {"Exception", "BaseException", "DataError"}) or not block.handlers


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def test_tensors_that_share_memory_are_written_as_copies_of_them_would_be(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": whole, "again": whole, "turned": whole.T, "part": whole[1:],
        "none": torch.zeros(0), "grown": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    files.write_tensors(tmp_path / "t.safetensors", tensors, {"a": "b"})
    assert (tmp_path / "t.safetensors").read_bytes() == save(copies(tensors), {"a": "b"})


TYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=1),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_of_all_types_and_shapes_are_written_as_the_library_writes_them(
    tmp_path: Path, shapes: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=draw).to(kind)
        for name, (kind, shape) in shapes.items()
    }
    files.write_tensors(tmp_path / "t.safetensors", tensors, metadata)
    assert (tmp_path / "t.safetensors").read_bytes() == save(tensors, metadata)


def test_writing_tensors_holds_no_copies_of_them(tmp_path: Path) -> None:
    assert in_fork(held_for, tmp_path / "t.safetensors", 2**28) < 2**26


def held_for(path: Path, size: int) -> int:
    """How many bytes are held to write tensors of so many, beside them."""
    tensors = {"a": torch.ones(size // 2, dtype=torch.uint8), "b": torch.ones(size // 8)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files.write_tensors(path, tensors)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

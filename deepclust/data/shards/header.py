"""One header block of a tar, and the records of extended headers, as values.

Everything here takes bytes that may be damaged or hostile, works in time linear in their number,
and raises `ValueError` with what is wrong. Python's `tarfile` is not used for reading. Up to 3.11.7
negative sizes send it backwards (CVE-2025-8194) and a PAX header of digits takes quadratic time
(CVE-2024-6232). It also allocates whatever a header claims. Names and sizes come out as `tarfile`
has them, which a test compares.
"""

from __future__ import annotations

import re
from typing import NamedTuple

BLOCK = 512
_OCTAL = re.compile(rb"[0-7]{1,24}")
_RECORD = re.compile(rb"([0-9]{1,9}) ([^=\n]{1,1024})=")
_KEPT = (b"path", b"linkpath", b"size")
_SPARSE_KEYS = b"GNU.sparse."
_LARGEST = 2**62  # larger sizes and offsets do not fit into what the index stores

REGULAR = (b"0", b"\0", b"7")
HARD_LINK, SYMBOLIC_LINK, FOLDER = b"1", b"2", b"5"
LONG_NAME, LONG_LINK, SPARSE = b"L", b"K", b"S"
PAX, PAX_OLD, PAX_GLOBAL = b"x", b"X", b"g"
EXTENSIONS = (LONG_NAME, LONG_LINK, PAX, PAX_OLD, PAX_GLOBAL)
DATALESS = (HARD_LINK, SYMBOLIC_LINK, b"3", b"4", FOLDER, b"6")  # devices are 3 and 4, a pipe is 6


class Header(NamedTuple):
    """What one block says: the member's name, kind (one byte), size in bytes, and link target."""

    name: str
    kind: bytes
    size: int
    target: str


def parse(block: bytes) -> Header:
    """Return the header in a block of 512 bytes; raise `ValueError` if it is none."""
    if len(block) != BLOCK:
        raise ValueError("it is cut short")
    _check_sum(block)
    kind, prefix = block[156:157], _text(block[345:500]) if block[345] else ""
    name = _text(block[:100])
    if kind == b"\0" and name.endswith("/"):
        kind = FOLDER
    size = _number(block[124:136])
    if kind == FOLDER:
        name = name.rstrip("/")
    if prefix and kind not in (LONG_NAME, LONG_LINK, SPARSE):
        name = f"{prefix}/{name}"
    return Header(name, kind, size, _text(block[157:257]) if block[157] else "")


def pax_records(data: bytes) -> dict[str, str]:
    """Return the records of a PAX header, each a line "LENGTH KEY=VALUE".

    Raises `ValueError` for others. Only what changes a member's bytes or name is kept.
    """
    records, at = {}, 0
    while at < len(data) and data[at]:
        match = _RECORD.match(data, at)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < at + length <= len(data):
            raise ValueError("its extended header is damaged")
        if data[at + length - 1 : at + length] != b"\n":
            raise ValueError("its extended header is damaged")
        if match[2] in _KEPT or match[2].startswith(_SPARSE_KEYS):
            records[_decoded(match[2])] = _decoded(data[match.end() : at + length - 1])
        at += length
    return records


def with_extensions(header: Header, long: dict[bytes, str], pax: dict[str, str]) -> Header:
    """Return the header with the name, target and size that extended headers before it gave."""
    name = pax.get("path", long.get(LONG_NAME, header.name))
    target = pax.get("linkpath", long.get(LONG_LINK, header.target))
    size = pax.get("size")
    if header.kind == FOLDER or "path" in pax:
        name = name.rstrip("/")
    return Header(name, header.kind, header.size if size is None else _decimal(size), target)


def extend(header: Header, data: bytes, long: dict[bytes, str], pax: dict[str, str]) -> None:
    """Add what an extended header and its data say to what is known of the member after it.

    Raises `ValueError` if they cannot be used.
    """
    if header.kind in (LONG_NAME, LONG_LINK):
        long[header.kind] = _text(data)
        return
    records = pax_records(data)
    if header.kind != PAX_GLOBAL:
        pax.update(records)
    elif records:
        raise ValueError(f"a global header gives all members one {min(records)}")


def is_sparse(header: Header, pax: dict[str, str]) -> bool:
    """Return whether a member's bytes are not all in the file."""
    return header.kind == SPARSE or any(key.startswith("GNU.sparse.") for key in pax)


def _check_sum(block: bytes) -> None:
    """Compare the check sum, which old programs made of signed bytes."""
    written = _number(block[148:156])
    plain = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if written == plain:
        return
    signed = plain - 256 * sum(1 for byte in block[:148] + block[156:] if byte > 127)
    if written != signed:
        raise ValueError("the check sum of its header is wrong")


def _number(field: bytes) -> int:
    """Return an octal number, or one in base 256; raise `ValueError` for every other text."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("a number in its header is negative or too large")
        number = int.from_bytes(field[1:], "big")
    else:
        # An old program wrote a NUL before a number; GNU tar reads it so too.
        digits = field.strip(b" \0") or b"0"
        if b"\0" in digits:
            digits = digits.partition(b"\0")[0].strip()
        if not _OCTAL.fullmatch(digits):
            raise ValueError(f"{digits!r} in its header is not a number")
        number = int(digits, 8)
    if number > _LARGEST:
        raise ValueError("a number in its header is negative or too large")
    return number


def _decimal(value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 20):
        raise ValueError(f"its extended header gives the size {value[:40]!r}")
    return int(value)


def _text(field: bytes) -> str:
    return _decoded(field.partition(b"\0")[0])


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

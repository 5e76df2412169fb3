"""Damage tars and index folders at random, and count what scan and index make of them.

Every case ends as right, as a clear error, as a traceback, as a hang (more than LIMIT seconds) or
as wrong. Right means: what `tarfile` reads of the damaged tar has the same places in our index, and
no image lies outside. Damaged index folders are opened and verified: wrong is a change of rows that
`--verify` does not notice.

    python tools/bench/fuzz_tars.py --count 10000 --seed 0 --out fuzz.json
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.data.shards.index import Index, build_index, open_index
from deepclust.data.shards.tar import TarEntry, entries, open_shard
from deepclust.errors import DeepclustError

BLOCK = 512
LIMIT = 5.0  # seconds
FIELDS = {
    "name": (0, 100), "mode": (100, 8), "size": (124, 12), "checksum": (148, 8), "type": (156, 1),
    "link": (157, 100), "magic": (257, 8), "prefix": (345, 155), "sparse": (386, 96),
}  # fmt: skip
SIZES = [
    b"-0000001000\0", b"-0000000001\0", b"+0000000012\0", b"1_000000000\0", b"0o17\0\0\0\0\0\0\0\0",
    b"77777777777\0", b"           \0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\xff" * 11 + b"\0",
    b"\x80" + bytes(3) + b"\x40" + bytes(7), b"\x80" + bytes(10) + b"\x09", b"abc".ljust(12, b"\0"),
]  # fmt: skip
PAX = [
    b"27 size=9223372036854775808\n", b"12 size=-512\n", b"14 size=1e1000\n", b"99 path=x\n",
    b"22 GNU.sparse.map=a,b\n", b"22 GNU.sparse.major=1\n", b"9" * 5000, b"0 a=b\n",
    b"20 path=\xff\xfe.\xe9t\xe9.png\n", b"-5 path=a\n", b"18 hdrcharset=BINA\n", b"11 path=\0\0\n",
]  # fmt: skip
TYPES = b"0123456789LKSxgXDVNAM\0"


class Hang(BaseException):
    """The time of a case is over; no `except Exception` takes it."""


def base_tars() -> list[bytes]:
    """Return small tars of the kinds that people have."""
    image = b"\x89PNG" + bytes(700)
    members = [("a.png", image), ("a.cls", b"3"), ("b.png", image), ("b.json", b'{"label": 1}')]
    long = [(f"{'folder/' * 20}{name}", data) for name, data in members]
    odd = [(f"caf\udce9{name}", data) for name, data in members]
    kinds = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    tars = [_tar(members, kind) for kind in kinds]
    tars += [_tar(long, kind) for kind in kinds[1:]]
    tars += [_tar(odd, tarfile.GNU_FORMAT), _tar(members, tarfile.GNU_FORMAT, link=True)]
    return [*tars, _tar([("x.input.png", image), ("y.input.png", image)], tarfile.PAX_FORMAT)]


def _tar(members: list[tuple[str, bytes]], kind: int, link: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=kind, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target, type_ in (
            ("c.png", members[0][0], tarfile.LNKTYPE),
            ("d.png", "nowhere.png", tarfile.LNKTYPE),
            ("e.png", members[0][0], tarfile.SYMTYPE),
        ):
            if link:
                member = tarfile.TarInfo(name)
                member.type, member.linkname = type_, target
                tar.addfile(member)
    return buffer.getvalue()


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Return the tar with one to three damages, in most cases with right check sums."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        data = dice.choice(DAMAGES)(bytearray(data), dice)
    return data


def _headers(data: bytes) -> list[int]:
    """Return where headers are: blocks whose check sum is right."""
    return [at for at in range(0, len(data), BLOCK) if _sum(data[at : at + BLOCK]) is not None]


def _sum(block: bytes) -> int | None:
    counted = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    try:
        return counted if int(block[148:156].strip(b" \0") or b"x", 8) == counted else None
    except ValueError:
        return None


def _seal(data: bytearray, at: int, dice: random.Random) -> bytes:
    if dice.random() < 0.9:
        block = data[at : at + BLOCK]
        data[at + 148 : at + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    return bytes(data)


def _field(data: bytearray, dice: random.Random) -> bytes:
    at = dice.choice(_headers(data) or [0])
    begin, length = FIELDS[dice.choice([*FIELDS])]
    for _ in range(dice.choice((1, 2, length))):
        where = at + begin + dice.randrange(length)
        if where < len(data):
            data[where] = dice.choice((dice.randrange(256), ord("7"), 0, 0x80, 0xFF))
    return _seal(data, at, dice)


def _size(data: bytearray, dice: random.Random) -> bytes:
    at = dice.choice(_headers(data) or [0])
    data[at + 124 : at + 136] = dice.choice(SIZES)
    return _seal(data, at, dice)


def _type(data: bytearray, dice: random.Random) -> bytes:
    at = dice.choice(_headers(data) or [0])
    data[at + 156 : at + 157] = bytes([dice.choice(TYPES)])
    return _seal(data, at, dice)


def _pax(data: bytearray, dice: random.Random) -> bytes:
    body = b"".join(dice.choice(PAX) for _ in range(dice.choice((1, 1, 3, 40))))
    claimed = dice.choice((len(body), len(body), 2**33 - 1, 0, len(body) + 9))
    header = bytearray(BLOCK)
    header[:3], header[124:136] = b"pax", b"%011o\0" % claimed
    header[156:157] = dice.choice((b"x", b"x", b"g", b"L", b"K", b"X"))
    _seal(header, 0, random.Random(1))
    block = bytes(header) + body + bytes(-len(body) % BLOCK)
    at = dice.choice(_headers(data) or [0])
    return bytes(data[:at]) + block * dice.choice((1, 1, 1, 300)) + bytes(data[at:])


def _truncate(data: bytearray, dice: random.Random) -> bytes:
    return bytes(data[: dice.randrange(len(data) + 1)])


def _blocks(data: bytearray, dice: random.Random) -> bytes:
    at, to = (BLOCK * dice.randrange(len(data) // BLOCK + 1) for _ in range(2))
    block, rest = data[at : at + BLOCK], data[:at] + data[at + BLOCK :]
    return bytes(rest[:to] + block * dice.choice((0, 1, 2)) + rest[to:])


def _flip(data: bytearray, dice: random.Random) -> bytes:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


DAMAGES: list[Callable[[bytearray, random.Random], bytes]] = [
    _field, _field, _size, _type, _pax, _truncate, _blocks, _flip
]  # fmt: skip


def outcome(case: Callable[[], str]) -> tuple[str, str]:
    """Return the class of a case's end, and what it said."""

    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        return case(), ""
    except Hang:
        return "hang", traceback.format_exc(limit=-3)
    except DeepclustError as error:
        return ("clear error" if len(str(error)) < 2000 else "endless error"), str(error)
    except Exception:
        return "traceback", traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_tar(folder: Path, data: bytes) -> str:
    """Index a tar and compare with `tarfile`, where that reads it without an error."""
    folder.mkdir()
    path = folder / "s.tar"
    path.write_bytes(data)
    index = build_index(folder)
    offsets, sizes = np.asarray(index.offsets, object), np.asarray(index.sizes, object)
    if (offsets + sizes > len(data)).any() or len([*index.keys]) != len(index):
        return "wrong"
    index.notes()
    with open_shard(path) as shard:
        ours = {entry.name: entry for entry in entries(shard)}
    return "right" if all(ours.get(e.name, e) == e for e in _by_tarfile(path)) else "wrong"


def _by_tarfile(path: Path) -> list[TarEntry]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            members = [m for m in tar if m.isreg() and not m.issparse()]
    except Exception:  # it raises what it likes, and is then no reference
        return []
    # A number that begins with a NUL is 0 for `tarfile`, and for GNU tar and us what follows it.
    data = path.read_bytes()
    members = [m for m in members if data[m.offset_data - BLOCK + FIELDS["size"][0]]]
    last = {member.name: member for member in members}.values()
    return [TarEntry(m.name, m.offset_data, m.size) for m in last]


def fuzz_tars(count: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Return the number of tars by outcome, and an example of what must not be."""
    dice, tars = random.Random(seed), base_tars()
    counts: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []
    slowest = 0.0
    for number in range(count):
        data, folder, began = mutate(dice.choice(tars), dice), scratch / "tar", time.monotonic()
        end, text = outcome(lambda folder=folder, data=data: try_tar(folder, data))  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - began)
        counts[end] += 1
        if end not in ("right", "clear error"):
            bad.append({"case": number, "end": end, "text": text})
            (scratch / f"case-{number}.tar").write_bytes(data)
        shutil.rmtree(folder, ignore_errors=True)
    return {"counts": dict(counts), "slowest_s": round(slowest, 3), "bad": bad[:20]}


def rows_of(index: Index) -> tuple[Any, ...]:
    """Return all that an index says of its samples."""
    labels = None if index.labels is None else index.labels.tolist()
    columns = (index.offsets.tolist(), index.sizes.tolist(), labels)
    return (*columns, [*index.keys], index.excluded, index.fingerprint, index.class_names)


def damages_of(file: Path, dice: random.Random) -> dict[str, bytes | None]:
    """Return damaged contents of a file: cut, flipped, replaced, and None for removed."""
    data = file.read_bytes()
    flips = {}
    for number in range(6):
        flipped = bytearray(data)
        flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        flips[f"flip {number}"] = bytes(flipped)
    cut = {"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data))}
    return {**flips, **cut, "longer": data + b"\0", "junk": b"{}" * 40, "removed": None}


def fuzz_index(scratch: Path, seed: int, *, old: bool = False) -> dict[str, Any]:
    """Damage every file of an index in every way; count opening and verifying apart.

    `old`: an index as older versions wrote it, without hashes.
    """
    dice, counts = random.Random(seed), {"open": Counter[str](), "verify": Counter[str]()}
    folder = scratch / "index"
    folder.mkdir()
    (folder / "s.tar").write_bytes(base_tars()[0])
    right = rows_of(build_index(folder))
    place, bad = folder / "deepclust-index", []
    if old:
        manifest = json.loads((place / "manifest.json").read_bytes())
        kept = ("format", "fingerprint", "labelled", "shards", "excluded")
        (place / "manifest.json").write_text(json.dumps({key: manifest[key] for key in kept}))
    for file in sorted(place.iterdir()):
        whole = file.read_bytes()
        for kind, data in damages_of(file, dice).items():
            for door, counter in counts.items():
                file.write_bytes(data) if data is not None else file.unlink()
                end, text = outcome(lambda door=door: _try_index(folder, door, right))  # type: ignore[misc]
                counter[end] += 1
                if end not in ("right", "clear error"):
                    bad.append({"file": file.name, "damage": kind, "door": door, "text": text})
                place.mkdir(exist_ok=True)
                file.write_bytes(whole)
    shutil.rmtree(folder)
    return {**{door: dict(counter) for door, counter in counts.items()}, "bad": bad[:20]}


def _try_index(folder: Path, door: str, right: tuple[Any, ...]) -> str:
    index = open_index(folder) if door == "open" else build_index(folder, verify=True)
    return "right" if rows_of(index) == right else "wrong"


def main() -> int:
    """Print a table of outcomes and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for tars that must not be")
    args = parser.parse_args()
    scratch = args.keep or Path(tempfile.mkdtemp(prefix="fuzz-tars-"))
    scratch.mkdir(exist_ok=True)
    result = {"tars": fuzz_tars(args.count, args.seed, scratch), "index": fuzz_index(scratch, 0)}
    result["old index"] = fuzz_index(scratch, 1, old=True)
    for what, counts in (
        ("tars", result["tars"]["counts"]),
        ("index opened", result["index"]["open"]),
        ("index verified", result["index"]["verify"]),
        ("old index opened", result["old index"]["open"]),
        ("old one verified", result["old index"]["verify"]),
    ):
        listed = "  ".join(f"{end}: {count}" for end, count in sorted(counts.items()))
        sys.stdout.write(f"{what:18}{listed}\n")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(scratch)
    # Nothing but --verify can see what is wrong with an index that has no hashes.
    old = [one for one in result["old index"]["bad"] if one["door"] == "verify" or one["text"]]
    return int(bool(result["tars"]["bad"] or result["index"]["bad"] or old))


if __name__ == "__main__":
    sys.exit(main())

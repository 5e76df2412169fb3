"""What C libraries print about an image has its name; what others print is passed on."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from deepclust.data.images.complaints import Complaints
from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.read.dataset import Batches, Request
from deepclust.data.shards.index import open_index
from tests.images import draw, encode, write_tar


def with_bad_profile(png: bytes) -> bytes:
    """A PNG that libpng warns of and reads."""
    chunk = b"iCCPx\0\0"
    crc = zlib.crc32(chunk).to_bytes(4, "big")
    return png[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + crc + png[33:]


def with_extra_bytes(jpeg: bytes) -> bytes:
    """A JPEG that libjpeg warns of and reads."""
    return jpeg[:-2] + b"\0\1\2\3" + jpeg[-2:]


def test_warnings_of_libraries_name_the_sample(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    image = draw(0, 16, 16)
    members = [
        ("a.png", encode(image)),
        ("b.png", with_bad_profile(encode(image))),
        ("c.jpg", with_extra_bytes(encode(image, "JPEG"))),
    ]
    write_tar(tmp_path / "s.tar", members)
    ids = np.arange(3)
    loaded = Batches(open_index(tmp_path))[Request(ids, ids, 0, (Crop(CentreCrop(16, 16)),))]
    assert not loaded.bad
    assert capfd.readouterr().err == ""
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("s.tar, key 'b', offset ")
    assert "libpng warning: iCCP" in said[0]
    assert "key 'c'" in said[1]
    assert "Corrupt JPEG data" in said[1]


def test_many_complaints_are_counted_and_other_output_is_passed_on(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    complaints = Complaints()
    for i in range(100):
        with complaints.about(b"x", lambda i=i: f"image {i}"):  # type: ignore[misc]
            os.write(2, f"other line\nCorrupt JPEG data: {i} extraneous bytes\n".encode())
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in said[:5]] == [f"image {i}" for i in range(5)]
    assert [text.partition("as of ")[2][:10] for text in said[5:]] == ["10 images ", "100 images"]
    assert capfd.readouterr().err == "other line\n" * 100


def test_an_error_leaves_stderr_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), Complaints().about(b"x", lambda: "image"):
        raise ValueError("x")
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"

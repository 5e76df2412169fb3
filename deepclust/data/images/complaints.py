"""What C libraries print about an image, with the image's name.

libpng, libjpeg and libtiff write to file descriptor 2 and know no name: "Corrupt JPEG data:
premature end of data segment". Some of these images are decoded all the same, and are not whole.
So the descriptor leads to a file in memory while one image is decoded. What other threads print
meanwhile is passed on as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator

EXAMPLES = 5  # images that are named for a kind of complaint; later ones are counted
_OF_LIBRARIES = re.compile(
    rb"^(libpng (warning|error): |Corrupt JPEG|Premature end of JPEG|Invalid |Unsupported |"
    rb"Warning, |Application transferred|TIFF\w*: |\S*\.tiff?: ).*\n?",
    re.MULTILINE,
)
_VARYING = re.compile(r"(0x)?\d+")


def may_complain(data: bytes | memoryview) -> bool:
    """Return whether a library may print something: not of a plain small PNG, or of a PPM.

    The descriptor takes 7 us for an image, a tenth of what such images take to decode.
    """
    plain_png = data[37:41] == b"IDAT" and data[:2] == b"\x89P"
    return not plain_png and data[:2] not in (b"P5", b"P6")


class Complaints:
    """Counts what libraries say of images, and logs it: the first by name, then at 10, 100, ..."""

    def __init__(self) -> None:
        """Begin with none."""
        self.counts: Counter[str] = Counter()
        self._file = -1

    @contextlib.contextmanager
    def about(self, data: bytes | memoryview, name: Callable[[], str]) -> Iterator[None]:
        """Take what is printed while an image is decoded; `name` is called when there is something.

        Only one thread of a process may do this at a time.
        """
        if not may_complain(data) or not hasattr(os, "memfd_create"):  # not Linux
            yield
            return
        if self._file < 0:
            self._file = os.memfd_create("complaints", os.MFD_CLOEXEC)
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            yield
            return
        os.dup2(self._file, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if os.lseek(self._file, 0, os.SEEK_CUR):
                self._tell(name(), self._taken())

    def _taken(self) -> bytes:
        text = os.pread(self._file, 2**16, 0)
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        return text

    def _tell(self, name: str, text: bytes) -> None:
        if rest := _OF_LIBRARIES.sub(b"", text):
            with contextlib.suppress(OSError):
                os.write(2, rest)
        matches = _OF_LIBRARIES.finditer(text)
        for line in dict.fromkeys(match[0].decode(errors="replace").strip() for match in matches):
            kind = _VARYING.sub("#", line)
            self.counts[kind] += 1
            count, log = self.counts[kind], logging.getLogger("deepclust")
            if count <= EXAMPLES:
                log.warning("%s: %s", name, line)
            elif str(count).strip("0") == "1":
                log.warning("%s, as of %d images by now in this process", line, count)

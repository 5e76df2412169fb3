"""Real servers on loopback that hold shards: a web server that can misbehave, and S3 (moto)."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

_PIECE = 4096


@dataclass
class Web:
    """A folder behind http; the other fields say what goes wrong, and what was asked for.

    faults   taken by requests for bytes, one each: a status to answer, or "drop" (half the body,
             then the connection breaks)
    cut      bytes that every *.tar has lost at its end
    """

    root: Path
    url: str = ""
    ranges: bool = True
    listing: bool = True
    down: bool = False
    cut: int = 0
    slow_s: float = 0.0  # before each piece of a body
    faults: deque[int | str] = field(default_factory=deque)
    asked: list[tuple[str, int, int]] = field(default_factory=list)  # path, first byte, end
    sent: Counter[str] = field(default_factory=Counter)  # bytes by path
    authorization: set[str | None] = field(default_factory=set)


@contextlib.contextmanager
def web(root: Path, host: str = "127.0.0.1") -> Iterator[Web]:
    """Serve a folder until the block ends."""
    state = Web(root)

    class Handler(_Handler):
        web = state

    with _Server((host, 0), Handler) as server:
        state.url = f"http://{host}:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield state
        state.down = True  # for connections that stay open
        server.shutdown()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, address: object) -> None:
        pass  # clients are killed in these tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        web = self.web
        if web.down:
            self.close_connection = True
            return None
        web.authorization.add(self.headers["Authorization"])
        place = web.root / unquote(urlsplit(self.path).path).lstrip("/")
        if place.is_dir() and web.listing:
            links = "".join(f'<a href="{p.name}">{p.name}</a>' for p in place.iterdir())
            return self._answer(
                200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"}
            )
        if not place.is_file():
            return self._answer(404)
        self._send_range(place)

    def _send_range(self, place: Path) -> None:
        web, size = self.web, place.stat().st_size
        size -= web.cut if place.suffix == ".tar" else 0
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if wanted is None or not web.ranges:
            return self._answer(200, place.read_bytes()[:size])
        first, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
        web.asked.append((place.name, first, stop))
        # a question for the size, of one byte, is answered whatever goes wrong
        fault = web.faults.popleft() if web.faults and stop - first > 1 else None
        if isinstance(fault, int):
            return self._answer(fault)
        if first >= size:
            return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
        with open(place, "rb") as file:
            data = os.pread(file.fileno(), stop - first, first)
        headers = {"Content-Range": f"bytes {first}-{stop - 1}/{size}"}
        self._answer(206, data, headers, place.name, drop=fault == "drop")

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None,
        name: str = "", drop: bool = False,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        body = body[: len(body) // 2] if drop else body
        with contextlib.suppress(OSError):  # the client has left
            for at in range(0, len(body), _PIECE if self.web.slow_s else len(body) or 1):
                piece = body[at : at + _PIECE] if self.web.slow_s else body
                threading.Event().wait(self.web.slow_s)
                self.web.sent[name] += len(piece)
                self.wfile.write(piece)
        self.close_connection = drop


@contextlib.contextmanager
def s3(bucket: str, folder: Path, prefix: str = "shards") -> Iterator[str]:
    """An S3 server with the files of `folder`; the environment names it, as on any machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "sesame", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        _upload(bucket, folder, prefix)
        yield f"s3://{bucket}/{prefix}"
    server.stop()


def _upload(bucket: str, folder: Path, prefix: str) -> None:
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=bucket)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        key = f"{prefix}/{path.relative_to(folder)}"
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    client.close()

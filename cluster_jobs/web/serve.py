"""Putting the server together, and running it until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from deepclust.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
MOST_AT_ONCE = 256  # connections


def require_extra() -> None:
    """Raise `ResourceError` that names what the extra `serve` would bring."""
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        text = f"deepclust serve needs {', '.join(missing)}: pip install 'deepclust[serve]'"
        raise ResourceError(text)


def make_app(
    folder: Path,
    token: str,
    host: str = "127.0.0.1",
    read_only: bool = False,
    allowed: Sequence[str] = (),
) -> ASGIApp:
    """Return the server over a folder of runs; with the token "" it asks for none.

    `allowed`: more names by which browsers may call it.
    """
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

    from cluster_jobs.web import api, api_more, pages, pages_clusters
    from cluster_jobs.web.answers import Answer
    from cluster_jobs.web.clusters import Views
    from cluster_jobs.web.folder import Runs
    from cluster_jobs.web.guard import Errors, Guard, known_hosts
    from cluster_jobs.web.reports import Reports
    from cluster_jobs.web.upload import Networks

    # FastAPI's own pages of the API load scripts from elsewhere: /api.html is ours
    app = FastAPI(title="deepclust", docs_url=None, redoc_url=None)
    app.state.runs, app.state.views = Runs(folder), Views()
    app.state.networks, app.state.reports = Networks(app.state.views), Reports()
    app.state.read_only, app.state.maps = read_only, {}

    def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        return Answer({"error": ", ".join(said)}, 422)

    def refuse_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # of a body in parts that are none, and of 405
        return Answer({"error": error.detail}, error.status_code)

    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_middleware(Errors)
    app.include_router(api.router)
    app.include_router(api_more.router)
    app.include_router(pages.router)
    app.include_router(pages_clusters.router)
    return Guard(app, token, read_only, known_hosts(host, *allowed))


def serve(
    folder: Path,
    host: str,
    port: int,
    token: str | None,
    read_only: bool,
    emit: Callable[[str], None],
    allowed: Sequence[str] = (),
) -> None:
    """Serve a folder of runs until Ctrl-C.

    `token` None: one is made. `allowed`: names of this machine behind a proxy. `emit` gets the
    link that opens the page.
    """
    require_extra()
    if token is not None and not (token.isascii() and token.isprintable() and len(token) >= 8):
        raise RecipeError("--token needs 8 printable characters or more")
    token = secrets.token_urlsafe(24) if token is None else token
    app = make_app(folder, token, host, read_only, allowed)
    import uvicorn

    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False,  # it would log the token
        limit_concurrency=MOST_AT_ONCE, server_header=False, timeout_graceful_shutdown=2,
    )  # fmt: skip
    sock = _bound(host, port)
    name = f"[{host}]" if ":" in host else host
    name = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(name, name)
    emit(f"serving {folder}{' (read-only)' if read_only else ''}; Ctrl-C ends it")
    emit(f"  http://{name}:{sock.getsockname()[1]}/?token={quote(token, safe='')}")
    uvicorn.Server(config).run(sockets=[sock])


def _bound(host: str, port: int) -> socket.socket:
    """Return the socket of the server, or raise `ResourceError` for a port that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen()  # a program that follows the printed link at once waits, and is not refused
    except (OSError, OverflowError) as error:
        sock.close()
        text = f"cannot listen at {host}, port {port}: {error}. Choose another --port"
        raise ResourceError(text) from error
    return sock

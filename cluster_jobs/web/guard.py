"""Who may ask: the checks that every request passes before a route sees it.

- The host is this machine, an address in digits, or one that was named. A page of another site
  whose name leads here (DNS rebinding) is refused.
- An Origin is that of the page itself: no request from other sites.
- The token comes as a header, a cookie or, from the printed link, in the query.
- A read-only server takes GET and HEAD alone.
- A body is read whole, up to a bound, before anything looks at it.
"""

from __future__ import annotations

import html
import ipaddress
import secrets
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster_jobs.web.answers import Answer, http_status, http_text
from deepclust.errors import DeepclustError

READING = ("GET", "HEAD")
MOST_BODY, MOST_UPLOAD = 2**20, 2**24  # bytes
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # without one a form of ours has the Origin "null"
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
ENTER = (
    "<!doctype html><html lang=en><meta charset=utf-8><title>deepclust</title>"
    '<link rel=icon href="data:,">'
    '<meta http-equiv=refresh content="0; url={0}"><a href="{0}">Go on to the runs</a></html>'
)


class TooLargeError(Exception):
    """A body has more bytes than its route takes."""


@dataclass
class Guard:
    """The outermost layer of the server. `hosts` are names that it may be called by."""

    app: ASGIApp
    token: str
    read_only: bool
    hosts: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _headers(message["headers"])}
            await send(message)

        refused = self._refusal(request)
        try:
            if refused is None:
                receive = await _whole_body(request, receive)
                await self.app(scope, receive, answer)
                return
        except TooLargeError as error:
            refused = _refuse(request, 413, str(error))
        await refused(scope, receive, answer)

    def _refusal(self, request: Request) -> Response | None:
        """Return why a request is refused, or the page of the printed link; None lets it pass."""
        host = request.headers.get("host", "")
        if not self._knows(host):
            text = "this server is not known by that Host: deepclust serve --allow-host NAME"
            return _refuse(request, 400, text)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return _refuse(request, 403, "requests from other sites are refused")
        entering = request.query_params.get("token")
        if not self._may_enter(request, entering):
            text = "open the link that deepclust serve has printed, or send its token"
            return _refuse(request, 401, text)
        if request.method not in READING and self.read_only:
            return _refuse(request, 403, "this server is read-only: deepclust serve --read-only")
        site = request.headers.get("sec-fetch-site", "same-origin")
        if request.method not in READING and site not in ("same-origin", "none"):
            return _refuse(request, 403, "requests from other sites are refused")
        if self.token and entering is not None and not _is_api(request):
            return self._enter(request, host)
        return None

    def _knows(self, host: str) -> bool:
        """Return whether a Host is one of ours: a name that was given, or an address in digits."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _may_enter(self, request: Request, entering: str | None) -> bool:
        """Return whether a request has the token; all are compared in constant time."""
        if not self.token:
            return True
        scheme, _, header = request.headers.get("authorization", "").partition(" ")
        given = [entering, request.cookies.get(_cookie(request))]
        given += [header.strip()] if scheme.lower() in ("bearer", "token") else []
        expected = self.token.encode()
        known = [
            secrets.compare_digest(one.encode("utf-8", "replace"), expected)
            for one in given if one is not None
        ]  # fmt: skip
        return any(known)

    def _enter(self, request: Request, host: str) -> Response:
        """Return the page that keeps the token as a cookie, and leads on without it."""
        rest = [(key, value) for key, value in parse_qsl(request.url.query) if key != "token"]
        path = "/" + request.url.path.lstrip("/\\")  # never the name of another host
        where = quote(path) + (f"?{urlencode(rest)}" if rest else "")
        answer = HTMLResponse(ENTER.format(html.escape(where)))
        answer.set_cookie(
            _cookie(request), self.token, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer


@dataclass
class Errors:
    """The innermost layer: an error becomes an answer with its text, also for a damaged run."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by its error where there is one."""
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            if not isinstance(error, DeepclustError):
                traceback.print_exc(file=sys.stderr)
            refused = _refuse(Request(scope), http_status(error), http_text(error))
            await refused(scope, receive, send)


def known_hosts(host: str, *more: str) -> frozenset[str]:
    """Return the names that a server at `host` may be called by."""
    return frozenset(name.lower() for name in ("localhost", host, socket.gethostname(), *more))


def _cookie(request: Request) -> str:
    """Return the name of the cookie: one for each port, which cookies do not tell apart."""
    return f"deepclust-{urlsplit('//' + request.headers.get('host', '')).port or 80}"


def _is_api(request: Request) -> bool:
    path = request.url.path
    return path.startswith("/api/") or path == "/openapi.json"


def _refuse(request: Request, code: int, text: str) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if code == 401 else None
    if _is_api(request):
        return Answer({"error": text}, code, headers)
    return PlainTextResponse(f"{code}: {text}\n", code, headers)


def _headers(given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer, with those of HEADERS that it has not set itself."""
    names = {name.lower() for name, _ in given}
    more = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
    return [*given, *(pair for pair in more if pair[0] not in names)]


async def _whole_body(request: Request, receive: Receive) -> Receive:
    """Return a `receive` that hands out the body, read whole; `TooLargeError` beyond the bound."""
    if request.method in READING:
        return receive
    most = MOST_UPLOAD if request.url.path.endswith("/predict") else MOST_BODY
    length = request.headers.get("content-length", "0")
    body = bytearray()
    if length.isdecimal() and int(length) > most:
        raise TooLargeError(f"the body has more than {most:,} bytes")
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return receive
        body += message.get("body", b"")
        if len(body) > most:
            raise TooLargeError(f"the body has more than {most:,} bytes")
        more = message.get("more_body", False)
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": bytes(body)}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay

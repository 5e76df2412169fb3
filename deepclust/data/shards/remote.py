"""Read bytes from object storage and web servers: range requests with retries and time limits.

fsspec supports the storages (s3://, gs://, ...) and is imported when the first URL is read. Each of
its requests asks for at most `CHUNK` bytes and may take `LIMIT_S`. A failed request is repeated
after `PAUSES_S`, over HTTP from the byte where the connection broke. After the last attempt an
`UnreachableError` says what happened. Where waiting cannot help (no such object, access denied),
it is raised at once.

A web server must answer range requests, otherwise it would send a whole shard for each image.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent import futures
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from deepclust.data.shards.url import Source, Url, redact
from deepclust.errors import DataError, ResourceError

CHUNK = 8 << 20  # bytes of one request
PAUSES_S = (0.1, 0.5, 2.0)  # before the second, third and last attempt of a read
LIMIT_S = 120.0  # of one request
WINDOW = 4  # concurrent requests for one shard that is copied
LARGEST_FETCHED = 64 << 20  # bytes of a dataset.json
_SILENCE_S = 60.0  # after which a web server that sends nothing counts as lost
_SIZE_REQUESTS = 32  # concurrent requests for sizes
_LATER = (408, 425, 429)  # HTTP statuses below 500 that may pass
_DENIED = ("PermissionError", "NoCredentialsError", "PartialCredentialsError")

T = TypeVar("T")


class UnreachableError(DataError):
    """A remote shard that cannot be read.

    Its samples are not replaced by others, as single unreadable images are: a whole shard would
    go missing without an error.
    """

    kind: Literal["missing", "denied", "cut", "down"] = "down"


class Interrupted(Exception):
    """The caller's `stopped()` became true."""


def never() -> bool:
    """Return False: the `stopped` of callers that nothing interrupts."""
    return False


def read(url: Url, offset: int, size: int, stopped: Callable[[], bool] = never) -> bytes:
    """Return `size` bytes at `offset`, and after a broken connection request only the rest.

    Raises `UnreachableError`, and `Interrupted` once `stopped()` is true.
    """
    data = bytearray()

    def rest() -> None:
        if len(data) < size:
            _range(url, offset + len(data), offset + size, data, stopped)
        if len(data) < size:
            raise EOFError(f"it ends at byte {offset + len(data)}")

    _retry(url, rest, stopped)
    return bytes(data)


def stream(url: Url, start: int, stop: int, stopped: Callable[[], bool] = never) -> Iterator[bytes]:
    """Yield the bytes [start, stop) in pieces of `CHUNK`, with `WINDOW` requests at a time."""
    left, ahead = threading.Event(), deque[futures.Future[bytes]]()
    with futures.ThreadPoolExecutor(WINDOW) as pool:
        try:
            for at in range(start, stop, CHUNK):
                size = min(CHUNK, stop - at)
                ahead.append(pool.submit(read, url, at, size, lambda: left.is_set() or stopped()))
                if len(ahead) == WINDOW:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            left.set()


def fetch(source: Source, largest: int = LARGEST_FETCHED) -> bytes | None:
    """Return a small file as a whole, or None if it is missing or access is denied.

    Raises `DataError` if it is larger than `largest` bytes.
    """
    if isinstance(source, Path):
        if not source.exists():
            return None
        _check_size(source, source.stat().st_size, largest)
        return source.read_bytes()
    try:
        size = _size(source)
    except UnreachableError as error:
        if error.kind in ("missing", "denied"):
            return None
        raise
    _check_size(source, size, largest)
    return b"".join(stream(source, 0, size))


def save(url: Url, path: Path, largest: int) -> None:
    """Copy a file that must exist, and be at most `largest` bytes, to `path`, piece by piece."""
    size = _size(url)
    _check_size(url, size, largest)
    with open(path, "wb") as file:
        for piece in stream(url, 0, size):
            file.write(piece)


def _check_size(source: Source, size: int, largest: int) -> None:
    if not 0 <= size <= largest:
        raise DataError(f"{source} has {size} bytes, more than the {largest} that it can need.")


def list_folder(folder: Url) -> list[Url]:
    """Return the *.tar of a folder in the storage's order, without hidden ones and subfolders."""
    place, query = folder._split()
    files = _filesystem(folder)

    def ask() -> list[dict[str, Any]]:
        files.invalidate_cache()
        listed: list[dict[str, Any]] = _call(files, "ls", _path(files, place), detail=True)
        return listed

    shards = []
    for entry in _retry(folder, ask):
        name = str(files.unstrip_protocol(str(entry["name"])))
        size = entry.get("size")
        url = Url(name + query, -1 if size is None else int(size))
        inside = name.rpartition("/")[0].endswith(place.rstrip("/").partition("://")[2])
        if inside and name.endswith(".tar") and not url.name.startswith("."):
            shards.append(url)
    return shards


def with_sizes(urls: Iterable[Url]) -> list[Url]:
    """Return the URLs with their sizes, requested where the listing did not give them."""
    with futures.ThreadPoolExecutor(_SIZE_REQUESTS) as pool:
        return list(pool.map(lambda url: url if url.size >= 0 else Url(url.text, _size(url)), urls))


def _size(url: Url) -> int:
    def ask() -> int:
        files = _filesystem(url)
        if url.over_http:
            return int(_wait(files, _http_size(files, url)))
        return int(_call(files, "info", _path(files, url.text))["size"])

    return _retry(url, ask)


def _range(url: Url, start: int, stop: int, into: bytearray, stopped: Callable[[], bool]) -> None:
    """Append the bytes [start, stop), or as far as the file goes, to `into` by one request."""
    files = _filesystem(url)
    if url.over_http:
        _wait(files, _http_range(files, url, start, stop, into), stopped)
    else:
        path = _path(files, url.text)
        into += _call(files, "cat_file", path, start=start, end=stop, stopped=stopped)


async def _http_range(files: Any, url: Url, start: int, stop: int, into: bytearray) -> None:
    """Append a range, but keep partial data and refuse a whole file, unlike fsspec."""
    async with await _http_get(files, url, start, stop) as answer:
        limit = len(into) + stop - start
        async for piece in answer.content.iter_any():
            into += piece[: limit - len(into)]


async def _http_size(files: Any, url: Url) -> int:
    async with await _http_get(files, url, 0, 1) as answer:
        return int(answer.headers["Content-Range"].rpartition("/")[2])


async def _http_get(files: Any, url: Url, start: int, stop: int) -> Any:
    import yarl

    session = await files.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    place = yarl.URL(url.text, encoded="%" in url.text)  # quoting again would break a signature
    answer = await session.get(place, headers=headers)
    try:
        answer.raise_for_status()
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _no_ranges(url, answer.status)
    except BaseException:
        answer.close()
        raise
    return answer


def _no_ranges(url: Url, status: int) -> UnreachableError:
    return UnreachableError(
        f"{url}: the server ignores range requests (HTTP {status} for a part of the file), and "
        "shards are read in parts. Serve them with nginx, Apache or S3 (`python -m http.server` "
        "has no range requests), or copy them here and give their folder."
    )


def _call(
    files: Any, name: str, *arguments: Any, stopped: Callable[[], bool] = never, **options: Any
) -> Any:
    """Call a method of fsspec's file system, and await it if it is asynchronous."""
    if not files.async_impl:
        return getattr(files, name)(*arguments, **options)
    return _wait(files, getattr(files, f"_{name}")(*arguments, **options), stopped)


def _wait(files: Any, work: Coroutine[Any, Any, T], stopped: Callable[[], bool] = never) -> T:
    """Return the result of work in fsspec's event loop, cancelled after `LIMIT_S` or a stop."""
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, LIMIT_S), files.loop)
    try:
        while not futures.wait([future], timeout=0.2).done:
            if stopped():
                raise Interrupted
        return future.result()
    finally:
        future.cancel()


def _retry(url: Url, work: Callable[[], T], stopped: Callable[[], bool] = never) -> T:
    """Do the work, and repeat it after pauses if it fails in a way that may pass."""
    for pause in (*PAUSES_S, None):
        if stopped():
            raise Interrupted
        try:
            return work()
        except (Interrupted, DataError, ResourceError):
            raise
        # Every storage has a library with errors of another type.
        except Exception as error:
            if pause is None or _is_final(error):
                # The cause may contain a secret, so it is left out.
                raise _unreachable(url, error) from None
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _LATER
    return isinstance(error, EOFError | FileNotFoundError) or type(error).__name__ in _DENIED


def _unreachable(url: Url, error: Exception) -> UnreachableError:
    status, name = getattr(error, "status", None), type(error).__name__
    reason = f"HTTP {status}" if isinstance(status, int) else f"{name} {redact(str(error))}".strip()
    kind: Literal["missing", "denied", "cut", "down"] = "down"
    if status in (401, 403, 407) or name in _DENIED:
        kind = "denied"
    elif status in (404, 410) or isinstance(error, FileNotFoundError):
        kind, reason = "missing", reason if status else "it does not exist"
    elif status == 416 or isinstance(error, EOFError):
        kind = "cut"
    unreachable = UnreachableError(f"cannot read {url}: {reason}. {_REMEDIES[kind]}")
    unreachable.kind = kind
    return unreachable


_REMEDIES = {
    "missing": "Restore it, or give the folder or pattern of the shards that exist.",
    "denied": "Give credentials where its storage looks for them (AWS_PROFILE or "
    "AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc).",
    "cut": "It is shorter than it was when it was indexed: restore the old one, or index the new "
    "ones with `deepclust index`.",
    "down": f"That was the last of {len(PAUSES_S) + 1} attempts: can this machine reach the "
    "storage? Finished work is kept; resume when it is back.",
}


def _path(files: Any, text: str) -> str:
    return str(files._strip_protocol(text))


def _filesystem(url: Url) -> Any:
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(url.protocol)
    except ImportError as error:
        raise ResourceError(
            f"{url} needs a package that is not installed ({redact(str(error))}): "
            "pip install 'deepclust[remote]' reads s3:// and https://, gs:// needs gcsfs as well"
        ) from None
    except ValueError as error:
        raise DataError(f"{url}: {redact(str(error))}. Use s3://, https:// or gs://.") from None
    host = tuple(sorted(kind._get_kwargs_from_urls(url.text).items()))
    return _connected(url.protocol, host, os.getpid())


@cache
def _connected(protocol: str, host: tuple[tuple[str, Any], ...], pid: int) -> Any:
    """Return one file system for all threads of a process, without fsspec's cached listings."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("http", "https"):
        import aiohttp

        limit = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        options["client_kwargs"] = {"timeout": limit, "trust_env": True}
    return fsspec.filesystem(protocol, **dict(host), **options)

"""The errors that a user can cause or see, each with an exit code; and no secret in what is seen.

A message names what is wrong, where, and the fix. Errors in our own code are `assert`s.

A URL holds credentials beside the name of a thing (user:password@, a signed ?query). `ray.env`,
the lines of `slurm.setup` and the words of `notify` hold keys of services. They are used as they
are. Whatever is shown, logged or written, except `recipe.yaml` itself, passes through `redact` or
`shown`. `redact` takes the URLs of a text apart. Libraries also quote parts of them:
"url: /x?sig=...". So it hides the secrets of all URLs that this process has met (`remember`)
wherever they are.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import yaml

HIDDEN = "***"
MOST = 1000  # secrets that are remembered: a list of shards may be signed one by one
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,40}://")  # without a limit: n^2 of n letters
_HOST = re.compile(r"(?:\[[0-9a-fA-F:.]*\]|[^\s/?#@:\[\]]*)(:\d*)?(?=[/?#;,]|$)")
_PARAMETERS = re.compile(r";[^\s/;=]*=[^\s/]*")
_LOOSE_QUERY = re.compile(r"\?[\w.~%-]+=[^\s'\"]*")
_ASSIGNMENT = re.compile(r"(\b[A-Za-z_]\w*=)(\"[^\"]*\"|'[^']*'|[^\s,;&|]+)")
_SECRET_WORD = re.compile(
    r"(?i)((?:^|\s)[\w-]*(?:token|passw|secret|api-?_?key|credential|login|auth)[\w-]*+[ =:]+)\S+"
)
_SECRET_NAME = re.compile(r"(?i)token|passw|pwd|secret|key|credential|auth|signature")
_ENVIRONMENT = "ray.env"
_COMMANDS = ("slurm.setup", "slurm.sbatch")
_WEBHOOK, _ALARM = "notify.webhook", "notify.command"  # whose secrets are in paths, too

_secrets: dict[str, None] = {}  # longest first when they are used


class DeepclustError(Exception):
    """The base class.

    `exit_code` is what the `deepclust` command returns.
    """

    exit_code = 1


class RecipeError(DeepclustError, ValueError):
    """Usage or recipe: unknown key, wrong type, bad choice."""

    exit_code = 2


class DataError(DeepclustError, ValueError):
    """Shards, images, labels or features are broken, missing, or too few for the recipe."""

    exit_code = 3


class MissingError(DataError, FileNotFoundError):
    """A file that should be there is not."""


class ResourceError(DeepclustError, RuntimeError):
    """A device, node, process or library that the job needs is missing."""

    exit_code = 4


class FollowedError(ResourceError):
    """This rank stops because another rank failed.

    The other rank's error is the cause.
    """


class DiskError(DeepclustError, OSError):
    """The disk is full, or a folder is not writable."""

    exit_code = 5


class NumericalError(DeepclustError, ValueError):
    """A value is NaN or infinite, or a clustering collapsed."""

    exit_code = 6


class RunHeldError(DeepclustError, RuntimeError):
    """Another controller holds the run."""

    exit_code = 7


class RunDiffersError(DeepclustError, ValueError):
    """The recipe or the data differ from those that the run was started with."""

    exit_code = 8


class RequeueWanted(DeepclustError):
    """The run stopped at a step boundary because it was asked to.

    `resume` continues it.
    """

    exit_code = 75


def error_of(exit_code: int, text: str) -> DeepclustError:
    """Return the error that another process ended with, by its exit code."""
    kinds = {kind.exit_code: kind for kind in DeepclustError.__subclasses__()}
    return kinds.get(exit_code, DeepclustError)(text)


def exit_code_of(name: str) -> int:
    """Return the exit code of an error that an event names, or 1 for other errors."""
    kinds = [*DeepclustError.__subclasses__()]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind.exit_code for kind in kinds if kind.__name__ == name), 1)


_NO_MEMORY = (
    "allocate memory", "failed to map segment", "Cannot allocate", "bad_alloc", "not enough memory",
    "start new thread", "unable to mmap", "temporarily unavailable",
)  # fmt: skip
# torch.OutOfMemoryError, CUDA's own error, cuBLAS: of a GPU
_NO_GPU_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def lack_of_memory(error: BaseException) -> ResourceError | None:
    """Return in words that there was no memory, which every library says in its own way.

    Return None for an error of something else. An import fails like this under `ulimit -v`, too.
    """
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, RuntimeError) and any(sign in text for sign in _NO_GPU_MEMORY):
        return ResourceError(
            f"the GPU is out of memory ({text}): end what else uses it, lower train.batch, "
            "data.extract_batch or cluster.k, or cluster on the CPU (cluster.device=cpu of a run, "
            "--device cpu of a file). Finished work is kept."
        )
    kinds = (ImportError, OSError, RuntimeError, SystemError)
    says_so = isinstance(error, kinds) and any(sign in str(error) for sign in _NO_MEMORY)
    if isinstance(error, DeepclustError) or not (says_so or isinstance(error, MemoryError)):
        return None
    return ResourceError(
        f"there is too little memory, or room for processes ({type(error).__name__}: {text}). "
        "Raise the limit (ulimit -v, ulimit -u, the memory of the job or container), or set "
        "train.batch, data.extract_batch or data.workers lower. Finished work is kept."
    )


def redact(text: str) -> str:
    """Return the text without user, password, query and parameters of the URLs in it."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    parts, at = [], 0
    schemes = list(_SCHEME.finditer(text))
    limits = [*(scheme.start() for scheme in schemes[1:]), len(text)][: len(schemes)]
    for match, limit in zip(schemes, limits, strict=True):
        end = _end_of_url(text, match, limit)
        parts += [text[at : match.end()], _bare(text[match.end() : end])]
        at = end
    return _LOOSE_QUERY.sub("", "".join([*parts, text[at:]]))


def _end_of_url(text: str, match: re.Match[str], limit: int) -> int:
    """Return where a URL ends: at white space, or at the quote that began it."""
    space = re.search(r"\s", text[match.end() : limit])
    end = limit if space is None else match.end() + space.start()
    quote = text[match.start() - 1 : match.start()]
    if quote in ("'", '"', "`") and (closed := text.rfind(quote, match.end(), end)) >= 0:
        return closed
    return end


def _bare(rest: str) -> str:
    """Return what follows the :// of a URL without its secrets.

    Passwords are not always escaped. Where a mark may belong to one, more is cut rather than less.
    """
    place = _without_user(rest)
    end = min((at for mark in "?#" if (at := place.find(mark)) >= 0), default=len(place))
    tail = re.search(r"[.,:)\]}>'\"]*$", place[end:])
    return _PARAMETERS.sub("", place[:end]) + (tail[0] if tail and end < len(place) else "")


def _without_user(rest: str) -> str:
    host, path = _HOST.match(rest), re.split(r"[?#]", rest, maxsplit=1)[0]
    if host and not (host[1] and "@" in path):
        return rest
    if "@" in path:
        place = rest[path.rindex("@") + 1 :]
        # "s" of bob:p@s?s@host: what looks like a host without a path is a part of the password
        lone = "/" not in path[path.rindex("@") + 1 :] and "@" in place
        return place.rpartition("@")[2] if lone else place
    return rest.rpartition("@")[2] if ":" in path else rest


def remember(url: str) -> None:
    """Hide the secrets of a URL from now on, also in texts that quote parts of it."""
    if len(_secrets) >= MOST:
        return
    rest = url.partition("://")[2]
    user = rest[: len(rest) - len(_without_user(rest))].rstrip("@")
    query = rest[len(user) :].partition("?")[2]
    values = [part.partition("=")[2] for part in query.split("&")]
    for text in (user, user.partition(":")[2], query, *values):
        for form in (text, unquote(text)):
            hide(form)


def hide(secret: str) -> None:
    """Hide a secret from now on, unless it is so short that it would hide other words too."""
    if len(secret) >= 6 and len(_secrets) < MOST:
        _secrets[secret] = None


def hide_values(named: dict[str, str]) -> None:
    """Hide the values of environment variables whose names say that they are secret."""
    for name, value in named.items():
        if _SECRET_NAME.search(name):
            hide(value)


def shown(value: Any, key: str = "") -> Any:
    """Return a recipe, or the value of a dotted key of one, as people may see it."""
    if isinstance(value, dict):
        return {k: shown(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if key.startswith(f"{_ENVIRONMENT}."):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [shown(one, key) for one in value]
    if not isinstance(value, str):
        return value
    if key.startswith(_WEBHOOK):
        return _server(value)
    if key.startswith(_ALARM):
        return _program(value)
    return command(value) if key.startswith(_COMMANDS) else redact(value)


def _server(webhook: str) -> str:
    """Return the server of a webhook, or the variable that holds it, without the rest."""
    if webhook.startswith("$"):
        return webhook
    scheme, separator, rest = redact(webhook).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}/{HIDDEN}" if separator else HIDDEN


def _program(line: str) -> str:
    """Return the first word of a shell command, without the others."""
    first, *others = command(line).split(maxsplit=1)[:2] or [HIDDEN]
    return f"{_server(first) if '://' in first else first} {HIDDEN}" if others else first


def command(line: str) -> str:
    """Return a line of shell without the values that it assigns or gives to secret options."""
    return _SECRET_WORD.sub(rf"\1{HIDDEN}", _ASSIGNMENT.sub(rf"\1{HIDDEN}", redact(line)))


def argument(word: str) -> str:
    """Return a word of our command line, which may be an override `a.b=c`, as people may see it."""
    key, separator, value = word.partition("=")
    if not separator or not re.fullmatch(r"[\w.-]+", key):
        return redact(word)
    key = key.removeprefix("--")
    if value.lstrip().startswith(("{", "[")):
        try:
            value = json.dumps(shown(yaml.safe_load(value), key))
        except (yaml.YAMLError, ValueError, RecursionError):
            value = HIDDEN
        return f"{key}={value}"
    return f"{key}={shown(value, key)}"


def holds_secrets(tree: dict[str, Any]) -> bool:
    """Return whether a recipe of plain values has anything that people may not see."""
    return bool(shown(tree) != tree)

"""No secret in what people see: one way out for texts, and one for recipes and their overrides.

A URL holds credentials beside the name of a thing (user:password@, a signed ?query). `ray.env` and
the lines of `slurm.setup` hold keys of services. They are used as they are. Whatever is shown,
logged or written, except `recipe.yaml` itself, passes through `redact` or `shown`.

`redact` takes the URLs of a text apart. Libraries also quote parts of them: "url: /x?sig=...". So
it hides the secrets of all URLs that this process has met (`remember`) wherever they are.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import yaml

HIDDEN = "***"
MOST = 1000  # secrets that are remembered: a list of shards may be signed one by one
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_HOST = re.compile(r"(?:\[[0-9a-fA-F:.]*\]|[^\s/?#@:\[\]]*)(:\d*)?(?=[/?#;,]|$)")
_PARAMETERS = re.compile(r";[^\s/;=]*=[^\s/]*")
_LOOSE_QUERY = re.compile(r"\?[\w.~%-]+=[^\s'\"]*")
_ASSIGNMENT = re.compile(r"(\b[A-Za-z_]\w*=)(\"[^\"]*\"|'[^']*'|[^\s,;&|]+)")
_SECRET_WORD = re.compile(
    r"(?i)((?:^|\s)-*[\w-]*(?:token|passw|secret|api-?_?key|credential|login|auth)[\w-]*[ =:]+)\S+"
)
_SECRET_NAME = re.compile(r"(?i)token|passw|pwd|secret|key|credential|auth|signature")
_ENVIRONMENT = "ray.env"
_COMMANDS = ("slurm.setup", "slurm.sbatch")

_secrets: dict[str, None] = {}  # longest first when they are used


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
    return command(value) if key.startswith(_COMMANDS) else redact(value)


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

"""The servers and buckets of this user's data and alarms: a run of others may name any other.

Reading a shard asks its server, with the user's keys where the storage wants some. So a place is
asked that the user has named in a recipe or an override, not one that only a run directory names.
Weights to start from in a library's hub are such a place too. So are the webhook of an alarm, and
its command, which is known by its hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from cluster_jobs import known
from deepclust.data.shards.url import is_url
from deepclust.errors import RecipeError, redact, shown
from deepclust.recipe import HUBS, Recipe
from deepclust.run.directory import Run

KIND = "data-places"


def places_of(recipe: Recipe) -> list[str]:
    """Return where a run of the recipe would ask or send: servers, a hub of weights, a command.

    Of a URL it is scheme and host (or bucket). What is secret is left out.
    """
    hub = [name for name in [recipe.init.weights or ""] if name.startswith(HUBS)]
    return sorted({*_places_of_shards(recipe), *hub, *_places_of_alarms(recipe)})


def _places_of_alarms(recipe: Recipe) -> set[str]:
    config = recipe.notify
    if config is None:
        return set()
    given = {"notify.webhook": config.webhook, "notify.command": config.command}
    hashes = {
        k: hashlib.blake2b(v.encode(), digest_size=8).hexdigest() for k, v in given.items() if v
    }
    return {f"{shown(given[key], key)} ({key}, {digest})" for key, digest in hashes.items()}


def _places_of_shards(recipe: Recipe) -> set[str]:
    shards = recipe.data.shards
    texts = [redact(one) for one in ([shards] if isinstance(shards, str) else shards)]
    # "zip://a::http://b/c" asks b
    return {t if "::" in t else "/".join(t.split("/")[:3]) for t in texts if is_url(t)}


def remember_places(recipe: Recipe) -> None:
    """Note the places of a recipe that the user has given."""
    _remember(places_of(recipe))


def _remember(places: Iterable[str]) -> None:
    for place in places:
        known.remember(KIND, place)


def require_known_places(run: Run, overrides: Sequence[str], remote: bool) -> None:
    """Raise `RecipeError` for data or weights at a place that only a run directory has named.

    `remote`: the user says that it may be read. An override of `data.shards` or `notify` names its
    own places.
    """
    recipe = run.recipe.replace(*overrides) if overrides else run.recipe
    if remote:
        remember_places(recipe)
    elif any(word.startswith("data.shards=") for word in overrides):
        _remember(_places_of_shards(recipe))
    if any(word.startswith("notify") for word in overrides):
        _remember(_places_of_alarms(recipe))
    unknown = set(places_of(recipe)).difference(known.known(KIND))
    if unknown:
        listed = ", ".join(sorted(unknown))
        raise RecipeError(
            f"the data, start weights or alarms of {run.path} are at {listed}, which you have not "
            "named before, and a run may come from somebody else. If you know that place, add "
            "--remote"
        )

"""The servers and buckets of this user's data: a run of somebody else may name any other.

Reading a shard asks its server, with the user's keys where the storage wants some. So a place is
asked that the user has named in a recipe or an override, not one that only a run directory names.
Weights to start from in a library's hub are such a place too.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster_jobs import known
from deepclust.data.shards.url import is_url
from deepclust.errors import RecipeError, redact
from deepclust.recipe import HUBS, Recipe
from deepclust.run.directory import Run

KIND = "data-places"


def places_of(recipe: Recipe) -> list[str]:
    """Return scheme and host (or bucket) of the URLs of `data.shards`, and a hub of weights.

    What is secret in them is left out.
    """
    shards = recipe.data.shards
    texts = [redact(one) for one in ([shards] if isinstance(shards, str) else shards)]
    # "zip://a::http://b/c" asks b
    places = {t if "::" in t else "/".join(t.split("/")[:3]) for t in texts if is_url(t)}
    return sorted(places | {one for one in [recipe.init.weights or ""] if one.startswith(HUBS)})


def remember_places(recipe: Recipe) -> None:
    """Note the places of a recipe that the user has given."""
    for place in places_of(recipe):
        known.remember(KIND, place)


def require_known_places(run: Run, overrides: Sequence[str], remote: bool) -> None:
    """Raise `RecipeError` for data or weights at a place that only a run directory has named.

    `remote`: the user says that it may be read; so does an override of `data.shards`.
    """
    if remote or any(word.startswith("data.shards=") for word in overrides):
        remember_places(run.recipe.replace(*overrides))
        return
    unknown = set(places_of(run.recipe)).difference(known.known(KIND))
    if unknown:
        raise RecipeError(
            f"the data or start weights of {run.path} are at {', '.join(sorted(unknown))}, which "
            "you have not named before, and a run may come from somebody else. If you know that "
            "place, add --remote"
        )

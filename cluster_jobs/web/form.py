"""The form of a new run, made from the schema of a recipe: a field for each key."""

from __future__ import annotations

import json
from typing import Any

from cluster_jobs.web.html import Part, field
from deepclust.recipe import Recipe

PREFIX = "key:"  # of the names of fields that are keys
SHARDS = "SHARDS"  # stands for data.shards until a person names them
OPEN = ("data", "cluster", "train")  # sections that are unfolded


def sections_of(name: str) -> list[Part]:
    """Return the sections of a shipped recipe, each with a field for every key."""
    recipe = Recipe.load(name, f"data.shards={SHARDS}")
    schema = type(recipe).model_json_schema()
    sections: dict[str, list[Part]] = {}
    for key, value in recipe.flat().items():
        section = key.partition(".")[0] if "." in key else "recipe"
        sections.setdefault(section, []).append(_field(key, value, _schema_of(schema, key)))
    return [
        {"name": section, "fields": fields, "open": section in OPEN}
        for section, fields in sections.items()
    ]


def overrides_of(name: str, sent: dict[str, str]) -> list[str]:
    """Return the keys that a person has changed in the form, as overrides of the recipe."""
    before = Recipe.load(name, f"data.shards={SHARDS}").flat()
    pairs = (
        (key.removeprefix(PREFIX), text.strip()) for key, text in sent.items() if PREFIX in key
    )
    return [f"{key}={text}" for key, text in pairs if key in before and text != shown(before[key])]


def shown(value: Any) -> str:
    """Return a value as its field shows it: a text without quotes, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _field(key: str, value: Any, schema: Part) -> Part:
    options = schema.get("enum") or (["true", "false"] if schema.get("type") == "boolean" else None)
    text = "" if key == "data.shards" else shown(value)
    made = field(key, f"{PREFIX}{key}", value=text, help=schema.get("description", ""))
    if key == "data.shards":
        made |= {"required": True, "help": "the folder of shards, or their URLs"}
    if options and text in (names := [shown(one) for one in options]):
        made["options"] = names
    return made


def _schema_of(schema: Part, key: str) -> Part:
    """Return the schema of a dotted key, {} where it is of no one kind."""
    here: Part = schema
    for part in key.split("."):
        here = _followed(schema, here).get("properties", {}).get(part, {})
    found = _followed(schema, here)
    return {**found, **here} if here else {}


def _followed(schema: Part, here: Part) -> Part:
    """Return what a reference leads to; of several kinds the first that has keys."""
    for one in (here, *here.get("anyOf", ()), *here.get("allOf", ()), *here.get("oneOf", ())):
        if "$ref" in one:
            found: Part = schema["$defs"][one["$ref"].rpartition("/")[2]]
            return found
    return here

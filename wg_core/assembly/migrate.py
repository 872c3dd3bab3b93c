"""Configuration of older minor versions: brought to the current one before its schema is applied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from wg_core.assembly.models import CONFIG
from wg_core.structure.versions import Format

Where = tuple[str | int, ...]


def _mapping(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _children(data: dict[str, Any], kind: str) -> Iterator[tuple[Where, str, dict[str, Any]]]:
    """The levels that stand in the configuration of a level, as `(place, kind, configuration)`."""
    found: list[tuple[Where, str, Any]] = []
    below = {"pipeline": "graph", "stage": "pipeline"}.get(kind)
    if below is not None:
        for i, node in enumerate(_list(data.get("nodes"))):
            found.append((("nodes", i, "config"), below, _mapping(node).get("config")))
    if kind == "stage":
        found.append((("graph",), "graph", data.get("graph")))
    if kind == "world":
        for role, stage in _mapping(_mapping(data.get("execution")).get("stages")).items():
            found.append((("execution", "stages", role), "stage", stage))
        base = _mapping(_mapping(data.get("execution")).get("base"))
        found.append((("execution", "base", "world"), "world", base.get("world")))
    for where, child, value in found:
        if isinstance(value, dict):
            yield where, child, cast("dict[str, Any]", value)


def version_problems(data: dict[str, Any], kind: str, format: Format = CONFIG) -> Iterator[tuple[Where, str]]:
    """Every version in a configuration, at any depth, that cannot be read, as `(place, why)`."""
    problem = format.problem(data["schema_version"]) if "schema_version" in data else ""
    if problem:
        yield (), problem
    for where, child, value in _children(data, kind):
        for place, why in version_problems(value, child, format):
            yield (*where, *place), why


def migrated(data: dict[str, Any], kind: str, format: Format = CONFIG, version: str | None = None) -> dict[str, Any]:
    """The configuration of a level and of all levels in it, each brought up from its own version.

    A level without a `schema_version` has that of the one that it stands in, at the top the current one.
    """
    if not format.has_steps:
        return data
    own = str(data.get("schema_version", version or format.current))
    made = format.upgrade(data, own)
    for where, child, value in list(_children(made, kind)):
        at: Any = made
        for part in where[:-1]:
            copied = dict(at[part]) if isinstance(at[part], dict) else list(at[part])
            at[part] = copied
            at = copied
        at[where[-1]] = migrated(value, child, format, own)
    return made

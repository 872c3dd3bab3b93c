"""Contracts: what a level takes and gives, as data that can be stored, compared and hashed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from wg_core.assembly.models import ContractEntry, PortEntry
from wg_core.errors import ConfigError
from wg_core.execution.node import Spec
from wg_core.state.canonical import plain, sha256_json
from wg_core.structure.port import kind_of

_NAME_SLOT = "@"


class HasSpecs(Protocol):
    def get_input_spec(self) -> list[Spec]: ...
    def get_output_spec(self) -> list[Spec]: ...


def contract_of(level: HasSpecs) -> ContractEntry:
    """The contract of any level: its external ports without what is inside, and the requests that its makers accept."""
    stored = getattr(level, "contract", None)
    if isinstance(stored, ContractEntry):
        return stored
    blocks: Any = getattr(level, "iter_blocks", tuple)()
    maker = next((b for b in blocks if callable(getattr(b, "request_schema", None))), None)
    return ContractEntry(
        inputs=[_port(entry) for entry in level.get_input_spec()],
        outputs=[_port(entry) for entry in level.get_output_spec()],
        requests=stored_requests(maker.request_schema) if maker is not None else None,
    )


def _port(entry: Spec) -> PortEntry:
    words: dict[str, Any] = {
        k: entry[k] for k in ("key", "types", "required", "aggregation", "streamable", "schema", "doc")
    }
    for key in ("default", "concat"):
        if key in entry:
            words[key] = _json(entry[key])
    words["schema"] = _json(words["schema"])
    return PortEntry(**words)


def _json(value: Any) -> Any:
    try:
        return plain(value, "value", ordered=True)
    except ConfigError:
        return kind_of(value)  # a default that no file can hold: its kind is what a caller may know


def contract_hash(level: HasSpecs | ContractEntry) -> str:
    """The sha256 of a contract, hex: equal for equal ports in any order, whatever is inside.

    Descriptions do not count; the schema of accepted requests does, the order of its keys included.
    """
    entry = level if isinstance(level, ContractEntry) else contract_of(level)
    parts: dict[str, Any] = {side: _ports(getattr(entry, side)) for side in ("inputs", "outputs")}
    if entry.requests is not None:
        parts["requests"] = json.dumps(entry.requests)  # with its order, in which a model writes
    return sha256_json(parts)


def _ports(entries: Sequence[PortEntry]) -> dict[str, Any]:
    return {
        e.key: {**port_words(e, keep=("types", "required")), "types": sorted(e.types)}
        for e in sorted(entries, key=lambda e: e.key)
    }


def port_words(entry: PortEntry, keep: Sequence[str] = ()) -> dict[str, Any]:
    """What a port entry says beyond the usual, without its key and description; and always what `keep` names."""
    said = entry.model_dump(mode="json", by_alias=True, exclude={"key", "doc"})
    usual = {"required": True, "aggregation": "single", "concat": None, "streamable": False, "schema": None}
    words = {k: v for k, v in said.items() if k != "default" and (k in keep or k not in usual or v != usual[k])}
    if "default" in entry.model_fields_set:
        words["default"] = entry.default
    return words


def contract_words(contract: ContractEntry) -> dict[str, Any]:
    """A contract as the plain data that a file holds."""
    words: dict[str, Any] = {
        side: [{"key": e.key, **port_words(e), **({"doc": e.doc} if e.doc else {})} for e in getattr(contract, side)]
        for side in ("inputs", "outputs")
    }
    words.update(contract.model_dump(mode="json", include={"config_hash", "models", "requests"}, exclude_defaults=True))
    return words


def spec_of(entry: PortEntry) -> Spec:
    """A stored port in the form of `get_input_spec`."""
    spec: Spec = {
        "key": entry.key, "name": entry.key, "node_id": "", "port_name": entry.key, "bindings": [],
        "types": list(entry.types), "required": entry.required, "optional": not entry.required,
        "aggregation": entry.aggregation, "streamable": entry.streamable, "schema": entry.schema_, "doc": entry.doc,
    }  # fmt: skip
    if entry.concat is not None:
        spec["concat"] = dict(entry.concat)
    if "default" in entry.model_fields_set:
        spec["default"] = entry.default
    return spec


# ---- schemas of requests -----------------------------------------------------------------------------------------------

KINDS_OF_NAMES = ("entity", "place", "term")


def stored_requests(request_schema: Any) -> dict[str, Any]:
    """What a contract keeps of `request_schema(names)`: the schema without names, and with a mark where names go."""
    return {"open": request_schema({}), "named": request_schema({k: [_NAME_SLOT + k] for k in KINDS_OF_NAMES})}


def filled_requests(stored: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The schema that `request_schema(names)` gives where the makers are."""
    return cast("dict[str, Any]", _filled(stored["open"], stored["named"], names))


def _filled(open_: Any, named: Any, names: Mapping[str, Sequence[str]]) -> Any:
    if isinstance(named, dict):
        node = cast("dict[str, Any]", named)
        for kind in KINDS_OF_NAMES:
            if node.get("enum") == [_NAME_SLOT + kind]:
                return {**node, "enum": list(names[kind])} if names.get(kind) else open_
        before = cast("dict[str, Any]", open_) if isinstance(open_, dict) else {}
        return {k: _filled(before.get(k), v, names) for k, v in node.items()}
    if isinstance(named, list):
        items = cast("list[Any]", named)
        others = cast("list[Any]", open_) if isinstance(open_, list) else []
        return [_filled(others[i] if i < len(others) else None, v, names) for i, v in enumerate(items)]
    return named

"""JSON Schema and loader on the structure of configurations: one verdict, whatever was done to a good file."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wg_blocks.json_schema import _in_one_piece
from wg_core import ConfigError
from wg_core.assembly.loader import Document, checked
from wg_core.assembly.models import KINDS, schema_of

EDGE = {"source_node": "a", "source_port": "y", "target_node": "b", "target_port": "x", "carry": True, "origin": "auto"}
EXPOSED = {"name": "x", "node_id": "a", "port_name": "x"}
LINK = {"target_kind": "world", "target_id": "w", "fragment": "f", "rel": None, "meta": {"a": 1}}
HYPER = {"id": "h", "kind": "group", "members": [{"path": "a", "port": "x", "role": None}], "payload": {"k": [1]}}
HEAD: dict[str, Any] = {"schema_version": "1.0", "title": "T", "metadata": {"a": [1, None]}, "links": [LINK], "hyperedges": [HYPER]}
PORTS: dict[str, Any] = {"edges": [EDGE], "exposed_inputs": [EXPOSED], "exposed_outputs": [EXPOSED]}
GRAPH: dict[str, Any] = {
    **HEAD, **PORTS, "kind": "graph", "id": "g", "task_kind": "llm",
    "nodes": [
        {"node_id": "a", "block_type": "t/a", "config": {"k": 1}, "trainable": False, "defaults": {"x": 1}, "hints": {"branch": "b"}, "links": [LINK]},
        {"node_id": "b", "model": "text"}, {"node_id": "c", "shares": "a"},
    ],
    "loops": [{"loop_id": "l", "num_steps": 3, "until": {"node": "a", "port": "y"}, "order": ["a", "b"]}],
    "tools": {"short": "a", "long-1": {"node": "b", "description": "d", "parameters": {"type": "object"}, "result_port": "y", "timeout": 1.5}},
}  # fmt: skip
ENDPOINT = {
    "url_env": "URL", "transport": "http", "token_env": "TOKEN", "timeout_s": 10, "connect_timeout_s": 0.5, "retries": 2,
    "backoff_s": 0.1, "allow_hosts": ["h"], "max_bytes": 4096,
}  # fmt: skip
PORT = {"key": "x", "types": ["text", "number"], "required": False, "aggregation": "sum", "default": 1, "streamable": True, "schema": {}, "doc": "d"}
CONTRACT = {"inputs": [PORT], "outputs": [{"key": "a:y", "types": "text|number"}], "config_hash": "0" * 64, "models": {"m": None}, "requests": {}}
FAR: dict[str, Any] = {"endpoint": ENDPOINT, "contract": CONTRACT}
CHILD: dict[str, Any] = {"trainable": True, "defaults": {"x": 1}, "links": [LINK]}
PIPELINE: dict[str, Any] = {
    **HEAD, **PORTS, "kind": "pipeline", "id": "p",
    "nodes": [{"node_id": "a", "config": GRAPH, **CHILD}, {"node_id": "b", **FAR}, {"node_id": "c", "endpoint_url": "http://h"}],
}  # fmt: skip
MAPPED: dict[str, Any] = {"reads": ["intent"], "writes": ["outcome"], "inputs": {"x": "intent.text"}, "outputs": {"outcome.narrative": "y"}}
STAGE: dict[str, Any] = {
    **HEAD, **PORTS, **MAPPED, "kind": "stage", "id": "s", "role": "author", "nodes": [{"node_id": "a", "config": PIPELINE, **CHILD}, {"node_id": "b", **FAR}],
}  # fmt: skip
LONE: dict[str, Any] = {**MAPPED, "graph": GRAPH}
WORLD: dict[str, Any] = {
    "kind": "world", "schema_version": "1.0", "world_id": "w", "title": "W", "tags": ["t"], "content": {"places": {}},
    "execution": {
        "cycle": "canonical", "models": {"text": {"block_type": "t/a", "config": {}, "defaults": {"x": 1}}}, "storage": {"root": None},
        "stages": {"author": LONE, "creator": {"role": "creator", **FAR}}, "state_schema": {"intent": {"mood": {"type": "string"}}}, "seed": 3,
        "budget": {"calls": 9, "cost": 0.5},
    },
}  # fmt: skip
OWN = {**WORLD, "execution": {**WORLD["execution"], "cycle": ["one", "world_update"], "stages": {"one": LONE}}}
SET = {"block_type": "adapter/lora", "rank": 4, "alpha": 8, "dropout": 0.1, "modules": ["q"], "targets": ["*"], "per_stage": True, "init_seed": 1}
LORA = {
    "kind": "world", "world_id": "l", "title": "L", "content": {},
    "execution": {"base": {"world": OWN, "config_hash": "0" * 64}, "adapters": {"folder": "f", "sets": {"style": SET}}, "seed": 3},
}  # fmt: skip
END = {"kind": "end_world", "schema_version": "1.0", "world_id": "w", "title": "W", "tags": ["t"], "content": {"root": "0" * 64}}
GOOD: dict[str, list[dict[str, Any]]] = {
    "graph": [GRAPH], "pipeline": [PIPELINE], "stage": [STAGE, LONE, {"kind": "stage", "reads": ["intent"], **FAR}],
    "remote": [{"kind": "remote", "id": "r", **FAR}, {"endpoint_url": "http://h"}], "world": [WORLD, OWN, LORA], "end_world": [END],
}  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.0, 1.5, 10**9, "", "x", "X_1", "a b", "a:y", "1", "true", "text", "text|number", "text|", "canonical",
    "world_update", "1.0", "1.7", "2.0", "manual", "http", [], {}, ["a"], ["author", "world_update"], [1], {"a": 1}, {"a b": "x"}, {"": {}}, "0" * 64,
]  # fmt: skip
KEYS = [
    "kind", "schema_version", "id", "title", "nodes", "graph", "config", "model", "shares", "block_type", "endpoint", "endpoint_url", "contract",
    "url", "url_env", "edges", "inputs", "outputs", "cycle", "stages", "base", "adapters", "seed", "timeout", "num_steps", "unknown", "$schema", "world_update",
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in below for p in places(v, (*at, k)))]


def at(document: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        document = document[key]
    return document


@st.composite
def changed(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """A good file of a kind with one to three things changed in it."""
    document = copy.deepcopy(draw(st.sampled_from(GOOD[kind])))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places(document)))
        if not place:
            document[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            continue
        holder, how = at(document, place[:-1]), draw(st.sampled_from(["remove", "set", "add", "move", "twice"]))
        if how == "remove":
            del holder[place[-1]]
        elif how == "set":
            holder[place[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from([*VALUES, GRAPH, ENDPOINT, CONTRACT, "http://h"])))
        elif how == "move":
            other = draw(st.sampled_from(places(document)))
            holder[place[-1]] = copy.deepcopy(at(document, other))
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
    return document


def accepted(kind: str, document: dict[str, Any]) -> bool:
    try:
        checked(KINDS[kind], Document(document, "<file>"))
    except ConfigError as error:
        assert str(error).startswith("<file>: ")
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_schema_and_loader_give_one_verdict(kind: str) -> None:
    """02 S-14, S-2: on structure, at every level; references and cycles are the loader's alone."""
    schema = jsonschema.Draft202012Validator(schema_of(kind))
    schema.check_schema(schema.schema)
    assert all(accepted(kind, good) and schema.is_valid(good) for good in GOOD[kind])
    seen: list[bool] = []

    @given(changed(kind))
    @settings(max_examples=60)
    def same(document: dict[str, Any]) -> None:
        verdict = accepted(kind, document)
        assert schema.is_valid(document) is verdict, (verdict, [e.message for e in schema.iter_errors(document)][:3])
        seen.append(verdict)

    same()
    assert {True, False} <= set(seen)


KEYWORDS = [
    "$id", "$schema", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary", "$comment", "$defs",
    "prefixItems", "items", "contains", "additionalProperties", "properties", "patternProperties",
    "dependentSchemas", "propertyNames", "if", "then", "else", "allOf", "anyOf", "oneOf", "not", "unevaluatedItems",
    "unevaluatedProperties", "type", "const", "enum", "multipleOf", "maximum", "minimum", "maxLength", "pattern",
    "minItems", "uniqueItems", "maxContains", "maxProperties", "required", "dependentRequired", "title", "default",
    "deprecated", "examples", "format", "contentEncoding", "contentSchema", "definitions", "dependencies",
    "$recursiveAnchor", "$recursiveRef",
]  # fmt: skip
FORMS = st.recursive(
    st.sampled_from([True, {}, 3, -1, None, "x", "#a", "(", "string", [], ["string"], ["a", "a"], [{}], [1]]),
    lambda form: st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), form, max_size=3) | st.lists(form, max_size=2),
    max_leaves=6,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(KEYWORDS), FORMS, min_size=1, max_size=2))
def test_the_meta_schema_in_one_piece_has_the_verdict_of_the_official_one(form: dict[str, Any]) -> None:
    """03 W-22: what is a schema is what draft 2020-12 says."""
    try:
        jsonschema.Draft202012Validator.check_schema(form)
        good = True
    except jsonschema.SchemaError:
        good = False
    assert _in_one_piece().is_valid(form) == good


def test_every_keyword_of_the_meta_schema_is_looked_at() -> None:
    """03 W-22: at the top and further in."""
    official = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
    for keyword in KEYWORDS:
        for value in (True, {}, 3, -1, "#a", [], ["a", "a"], {"a": 3}, {"a": {"type": "no"}}, [{"minLength": -1}]):
            for form in ({keyword: value}, {"items": {keyword: value}}, {"$defs": {"d": {"anyOf": [{keyword: value}]}}}):
                assert _in_one_piece().is_valid(form) == official.is_valid(form), form

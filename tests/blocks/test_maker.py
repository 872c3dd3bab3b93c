"""The maker: requests are checked against the tool table, carried out, and recorded."""

import hashlib
import json
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wg_blocks import maps
from wg_blocks.json_schema import check_schema
from wg_blocks.maker import Dispatch, schema_error
from wg_core import Block, Port, current_context
from wg_core.assembly.pool import ModelPool
from wg_core.assembly.registry import BlockRegistry
from wg_core.errors import ConfigError, OutputContractError, ToolError
from wg_core.execution.blobs import MemoryBlobs
from wg_core.execution.context import FRAME, Event, Frame, RunOptions, derive_seed


class Note(Block):
    """Writes a line."""

    ports = (
        Port("subject", "in", "text", schema={"type": "string", "maxLength": 20}),
        Port("mood", "in", "text", default="calm", schema={"type": "string", "enum": ["calm", "grim"]}),
        Port("out", "out", "text"),
    )
    written: list[str] | None = None

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        text = f"{inputs['subject']}: {inputs['mood']}"
        if self.written is not None:
            self.written.append(text)
        return {"out": text}


class Invert(Block):
    """Turns a picture into its negative, twice."""

    ports = (Port("image", "in", "image"), Port("out", "out", "image"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"out": np.concatenate([1 - inputs["image"], inputs["image"]])}


class Wants(Block):
    """Has an input that no request can give."""

    ports = (Port("world", "in", "world"), Port("out", "out", "text"))


class Silent(Block):
    """Gives a number only."""

    ports = (Port("out", "out", "number"),)


class Empty(Block):
    """Declares a text and does not give it."""

    ports = (Port("out", "out", "text", optional=True),)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {}


def build(config: dict[str, Any]) -> Block:
    from wg_blocks.terrain import Relief

    kinds = {
        "image/relief": Relief,
        "t/note": Note,
        "t/invert": Invert,
        "t/wants": Wants,
        "t/silent": Silent,
        "t/empty": Empty,
    }
    return kinds[config["block_type"]](**config.get("config", {}))


MAP = {
    "block": {"block_type": "image/relief", "config": {"size": 128}},
    "slot": "images",
    "description": "a relief map",
}
NOTE = {"block": {"block_type": "t/note"}, "slot": "texts"}
TABLE = {"map": MAP, "note": NOTE}


def dispatch(**options: Any) -> Dispatch:
    return Dispatch(**{"makers": TABLE, "build": build, **options})


def asked(**changes: Any) -> dict[str, Any]:
    return {"id": "r1", "slot": "images", "maker": "map", "params": {"land_share": 0.4}, **changes}


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that obey a schema of the subset."""
    if "anyOf" in schema:
        return st.one_of(*map(values, schema["anyOf"]))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "object":
            return st.fixed_dictionaries({k: values(schema["properties"][k]) for k in schema["required"]})
        case "array":
            return st.lists(values(schema["items"]), min_size=schema.get("minItems", 0), max_size=schema["maxItems"])
        case "number":
            return st.floats(schema.get("minimum", -1e6), schema.get("maximum", 1e6))
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=schema["maxLength"])
    raise AssertionError(schema)


def test_pictures_and_texts_become_artifacts():
    # proves 03 W-24, W-3
    block = dispatch()
    requests = [asked(seed=7), {"id": "r2", "slot": "texts", "maker": "note", "params": {"subject": "Lys"}}]
    artifacts = block.run({"requests": requests}, strict_types=True)["artifacts"]
    picture, text = artifacts["images"][0], artifacts["texts"][0]
    blobs = current_context().blobs
    data = blobs.get(picture["id"])
    assert hashlib.sha256(data).hexdigest() == picture["id"] and picture["uri"] == f"blob:{picture['id']}"
    assert (picture["media_type"], picture["width"], picture["height"], picture["slot"]) == (
        "image/png",
        128,
        128,
        "images",
    )
    assert picture["made_by"] == {"maker": "map", "graph": "map", "models": [], "seed": 7, "request": 0}
    assert maps.measure(maps.from_png(data))["kind"] == "map"
    assert blobs.get(text["id"]) == b"Lys: calm" and text["media_type"].startswith("text/plain")
    assert text["made_by"]["request"] == 1
    assert json.loads(json.dumps(artifacts)) == artifacts


def test_the_picture_is_the_maker_s_own_to_the_bit():
    made = dispatch().run({"requests": [asked(seed=7)]})["artifacts"]["images"][0]
    image = build(MAP["block"]).run({"land_share": 0.4, "seed": 7})["image"]
    pixels = maps.from_png(current_context().blobs.get(made["id"]))
    assert np.array_equal(pixels, np.rint(image[0].transpose(1, 2, 0) * 255).astype(np.uint8))


def test_missing_seeds_derive_from_node_seed_and_index():
    requests = [asked(), asked(id="r2")]
    one, two = dispatch().run({"requests": requests})["artifacts"]["images"]
    assert [one["made_by"]["seed"], two["made_by"]["seed"]] == [
        derive_seed(current_context().node_seed(), n) for n in range(2)
    ]
    assert one["id"] != two["id"]
    assert dispatch().run({"requests": requests})["artifacts"]["images"] == [one, two]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_obeys_the_schema_is_accepted(data):
    block = dispatch(max_requests=3)
    written = data.draw(values(block.request_schema()))
    for number, request in enumerate(written["requests"]):
        request["id"] = f"r{number + 1}"
    block.check(json.loads(json.dumps(written))["requests"])


def test_the_schema_bounds_everything():
    schema = dispatch(max_requests=2).request_schema()
    assert json.loads(json.dumps(schema)) == schema
    check_schema(schema)
    requests = schema["properties"]["requests"]
    assert (requests["minItems"], requests["maxItems"]) == (1, 2)
    draw, note = requests["items"]["anyOf"]
    assert draw["properties"]["maker"]["const"] == "map" and draw["properties"]["slot"]["const"] == "images"
    assert draw["properties"]["id"]["enum"] == ["r1", "r2"] and draw["description"] == "a relief map"
    assert "seed" not in draw["properties"] and "seed" not in draw["properties"]["params"]["properties"]
    assert draw["properties"]["params"]["required"] == ["land_share", "ruggedness", "form", "place"]
    assert note["properties"]["params"]["properties"]["subject"]["maxLength"] == 20

    def unbounded(part: dict[str, Any]) -> list[Any]:
        if part.get("type") == "string" and not {"enum", "const", "maxLength"} & set(part):
            return [part]
        below = [
            *part.get("properties", {}).values(),
            *part.get("anyOf", ()),
            *([part["items"]] if "items" in part else []),
        ]
        return [found for p in below for found in unbounded(p)]

    assert unbounded(schema) == []
    one = dispatch(makers={"map": MAP}, max_requests=1).request_schema()["properties"]["requests"]
    assert "anyOf" not in one["items"] and one["maxItems"] == 1


def test_the_schema_compiles_for_constrained_decoding():
    llguidance = pytest.importorskip("llguidance")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(dispatch().request_schema()))
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"maker": "mapp"}, r"requests\[1\]\.maker 'mapp' is not in the tool table; valid: map, note"),
        ({"maker": ["map"]}, "not in the tool table"),
        ({"slot": "texts"}, "slot is 'images' for maker 'map'"),
        ({"params": {"land_share": 1.5}}, r"params\.land_share: 1\.5 is greater than the maximum of 1"),
        ({"params": {"land_share": -0.1}}, "land_share: -0.1 is less than the minimum"),
        ({"params": {"land_share": True}}, "land_share: True is not of type 'number'"),
        ({"params": {"land_share": float("nan")}}, "params is no JSON value"),
        ({"params": {"land_share": "much"}}, "land_share: 'much' is not of type 'number'"),
        ({"params": {"form": "moon"}}, r"form: 'moon' is not one of \['free'"),
        ({"params": {"place": "x" * 65}}, "place: .* is too long"),
        ({"params": {"land_shar": 0.5}}, "has no 'land_shar'; did you mean 'land_share'"),
        ({"params": {"seed": 3}}, "a seed stands in the request itself"),
        ({"params": []}, r"params: \[\] is not of type 'object'"),
        ({"seed": -1}, "seed: -1 is less than the minimum of 0"),
        ({"seed": 2**63}, "seed: .* is greater than the maximum"),
        ({"seed": 1.5}, "seed: 1.5 is not of type 'integer'"),
        ({"colour": "red"}, "has no 'colour'"),
        ({"id": "../x"}, "id"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(changes, says):
    written: list[str] = []

    def build_noting(config: dict[str, Any]) -> Block:
        block = build(config)
        if isinstance(block, Note):
            block.written = written
        return block

    good = {"id": "r0", "slot": "texts", "maker": "note", "params": {"subject": "Lys"}}
    block = dispatch(build=build_noting)
    with pytest.raises(ValueError, match=says) as caught:
        block.run({"requests": [good, asked(**changes)]})
    assert isinstance(caught.value, (ToolError, ConfigError))
    assert written == []
    block.run({"requests": [good]})
    assert written == ["Lys: calm"]


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        ([], "requests are 1 to 4"),
        ([asked(id=f"r{n}") for n in range(5)], "requests are 1 to 4"),
        ([asked(), asked()], r"requests\[1\]\.id 'r1' is taken"),
        (["map"], r"requests\[0\] is an object"),
        ([{"id": "r1", "slot": "images", "maker": "map"}], "lacks 'params'"),
        ([{"id": "r1", "slot": "texts", "maker": "note", "params": {}}], "'subject' is a required property"),
    ],
)
def test_wrong_lists_are_refused(requests, says):
    with pytest.raises(ToolError, match=says):
        dispatch().run({"requests": requests})


def test_an_image_wish_is_an_artifact_and_a_batch_gives_one_artifact_each():
    table = {**TABLE, "invert": {"block": {"block_type": "t/invert"}, "slot": "images"}}
    block = dispatch(makers=table)
    picture = block.run({"requests": [asked(seed=1)]})["artifacts"]["images"][0]
    request = asked(maker="invert", params={"image": picture["id"]})
    negative, same = block.run({"requests": [request]})["artifacts"]["images"]
    assert same["id"] == picture["id"]
    blobs = current_context().blobs
    first, second = (maps.from_png(blobs.get(a["id"])) for a in (picture, negative))
    assert np.array_equal(255 - first, second)
    with pytest.raises(ToolError, match=r"params\.image: no artifact 'ffffffffffff'"):
        block.run({"requests": [asked(maker="invert", params={"image": "f" * 64})]})


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "no makers"),
        ({"map": {"slot": "images"}}, "one of 'block' and 'graph'"),
        ({"map": {**MAP, "graph": {}}}, "one of 'block' and 'graph'"),
        ({"map": {"block": MAP["block"]}}, "needs 'slot'"),
        ({"map": {**MAP, "slots": 1}}, "has no 'slots'; did you mean 'slot'"),
        ({"map": 3}, "is a mapping"),
        (
            {"w": {"block": {"block_type": "t/wants"}, "slot": "texts"}},
            r"makers\.w: input 'world' \(world\) cannot be asked for",
        ),
        ({"s": {"block": {"block_type": "t/silent"}, "slot": "texts"}}, r"makers\.s gives out \(number\)"),
    ],
)
def test_wrong_tables_are_refused(table, says):
    with pytest.raises(ToolError, match=says):
        dispatch(makers=table)


def test_a_maker_that_gives_nothing_fails():
    block = dispatch(makers={"e": {"block": {"block_type": "t/empty"}, "slot": "texts"}})
    with pytest.raises(OutputContractError, match=r"maker 'e' gave no image and no text for requests\[0\]"):
        block.run({"requests": [{"id": "r1", "slot": "texts", "maker": "e", "params": {}}]})


def test_a_graph_entry_is_built_as_a_graph():
    seen: list[dict[str, Any]] = []

    def spy(config: dict[str, Any]) -> Block:
        seen.append(config)
        return Note()

    graph = {"kind": "graph", "id": "g", "nodes": []}
    dispatch(makers={"note": {"graph": graph, "slot": "texts"}}, build=spy)
    assert seen == [{"block_type": "graph/ref", "config": {"graph": graph}}]


def test_makers_are_sub_blocks():
    block = dispatch()
    assert list(block.get_sub_blocks()) == ["map", "note"]
    assert len(list(block.iter_blocks())) == 3
    assert block.config == {"makers": TABLE}


class Untold(Block):
    ports = (
        Port("size", "in", "number", schema={"type": "numbr"}),
        Port("text", "out", "text"),
    )

    def forward(self, inputs):
        return {"text": str(inputs["size"])}


def test_a_maker_with_a_bad_schema_is_refused():
    with pytest.raises(ToolError, match=r"makers\.odd\.size: bad JSON schema"):
        Dispatch(makers={"odd": {"block": {"block_type": "note/untold"}, "slot": "texts"}}, build=lambda cfg: Untold())


@pytest.mark.parametrize("value", [1, 1.5, sys.maxsize])
def test_numbers_fit(value):
    assert schema_error(value, {"type": "number", "minimum": 0}, "v") is None


def test_in_a_run_the_run_s_blobs_hooks_and_path_are_used():
    registry = BlockRegistry()
    registry.register("maker/dispatch", "wg_blocks.maker:Dispatch")
    registry.register("image/relief", "wg_blocks.terrain:Relief")
    config = {"block_type": "maker/dispatch", "config": {"makers": {"map": MAP}, "max_requests": 2}}
    block, pool = registry.build(config, pool=ModelPool()), MemoryBlobs()
    assert block.to_config() == config
    events: list[Event] = []
    frame = Frame("graph", "draw", RunOptions(seed=5, blobs=pool), hooks=[events.append])
    frame.node_id = "make"
    token = FRAME.set(frame)
    try:
        made = block.run({"requests": [asked(), asked(id="r2")]})["artifacts"]["images"]
        seed = derive_seed(current_context().node_seed(), 1)
    finally:
        FRAME.reset(token)
    assert all(pool.has(a["id"]) for a in made) and not current_context().blobs.has(made[0]["id"])
    assert made[0]["made_by"]["graph"] == "draw/make/map"
    progress = [(e.path, e.data["done"], e.data["total"]) for e in events if e.kind == "progress"]
    assert progress == [("draw/make", n, 2) for n in range(3)]
    assert made[1]["made_by"]["seed"] == seed != derive_seed(current_context().node_seed(), 1)

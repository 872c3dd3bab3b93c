"""The five blocks, their forms and hashes."""

import copy
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wg_core.errors import ConfigError
from wg_core.state.canonical import canonical_json, parse_json, plain, sha256_json
from wg_core.state.state import BLOCKS, Artifact, State, StateSchema, block_name, block_schema

SHA = "ab" * 32
FULL = {
    "intent": {"text": "go", "focus": ["mara"]},
    "generation_config": {"requests": [{"id": "r1", "slot": "images", "maker": "draw", "params": {"x": 1}, "seed": 7}]},
    "artifacts": {"images": [{"id": SHA, "media_type": "image/png", "slot": "images", "width": 8, "height": 8}]},
    "descriptions": {"items": [{"artifact_id": SHA, "text": "a shore", "facts": {"land": 0.5}}]},
    "outcome": {"narrative": "it rained", "changes": [{"op": "add", "kind": "place", "id": "pier", "fields": {}}]},
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(string.ascii_letters, min_size=1, max_size=8)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)
facts = st.dictionaries(names, values, max_size=3)
changes = st.fixed_dictionaries(
    {
        "op": st.sampled_from(["add", "update", "retire"]),
        "kind": st.sampled_from(["entity", "place", "term", "rule"]),
        "id": st.sampled_from(["a", "b", "c", " bad"]),
        "fields": facts,
    }
)
shas = st.sampled_from([SHA, "cd" * 32])
blocks = st.fixed_dictionaries(
    {},
    optional={
        "intent": st.fixed_dictionaries({"text": texts}, optional={"focus": st.lists(names, max_size=2)}),
        "generation_config": st.fixed_dictionaries(
            {
                "requests": st.lists(
                    st.fixed_dictionaries({"id": names, "slot": names, "maker": names, "params": facts}),
                    max_size=2,
                    unique_by=lambda r: r["id"],
                )
            }
        ),
        "artifacts": st.dictionaries(
            names,
            st.lists(st.fixed_dictionaries({"id": shas, "media_type": st.just("image/png")}), max_size=2),
            max_size=2,
        ),
        "descriptions": st.fixed_dictionaries(
            {"items": st.lists(st.fixed_dictionaries({"artifact_id": shas, "text": texts, "facts": facts}), max_size=2)}
        ),
        "outcome": st.fixed_dictionaries({"narrative": texts, "changes": st.lists(changes, max_size=3)}),
    },
)


@given(blocks)
@settings(max_examples=60, deadline=None)
def test_round_trip_and_hash(value):
    """W-1, W-4: JSON there and back gives the equal state and hash, whatever the order of keys and addressing."""
    state = State.of(value)
    text = json.dumps(state.to_json())
    assert State.from_json(text) == state == State.from_json(state.to_json())
    backwards = State.of({BLOCKS.index(b) + 1: v for b, v in reversed(list(state.to_json().items()))})
    assert backwards.hash() == state.hash() == sha256_json(state.to_json())
    for block, held in state.to_json().items():
        assert state.put(block, held) == state
    assert state.filled() <= {BLOCKS.index(b) + 1 for b in value}


@given(values)
@settings(max_examples=100, deadline=None)
def test_canonical_json_is_a_fixed_point(value):
    text = canonical_json(plain(value, "v"))
    assert canonical_json(parse_json(text)) == text


def test_filled_and_empty():
    """W-1: a block is filled when it is present and not empty."""
    assert State().filled() == frozenset()
    assert State.of(FULL).filled() == {1, 2, 3, 4, 5}
    empty = [
        {1: {}}, {1: {"text": "  \n"}}, {1: {"text": " ", "focus": ["mara"]}}, {2: {}}, {2: {"requests": []}}, {3: {}},
        {3: {"images": [], "audios": []}}, {4: {"items": []}}, {4: {"items": [{"artifact_id": SHA, "text": " "}]}},
        {5: {}}, {5: {"narrative": " ", "changes": []}},
    ]  # fmt: skip
    for blocks in empty:
        assert State.of(blocks).filled() == frozenset(), blocks
    assert State.of({5: {"changes": FULL["outcome"]["changes"]}}).filled() == {5}
    assert State.of({4: {"items": [{"artifact_id": SHA, "facts": {"land": 1}}]}}).filled() == {4}
    assert State.of({"1": {"text": "x"}, 3: FULL["artifacts"]}).filled_names() == ("intent", "artifacts")


def test_immutable():
    """W-1: neither attributes, given values nor got values lead back into a state."""
    given_value = {"text": "go", "focus": ["mara"]}
    state = State().put(1, given_value)
    before = state.hash()
    given_value["focus"].append("x")
    state.get("intent")["text"] = "changed"
    state.to_json()["intent"]["text"] = "changed"
    state.read("intent.focus").append("y")
    assert state == State().put(1, {"text": "go", "focus": ["mara"]}) and state.hash() == before
    assert state.put(1, {"text": "other"}) != state
    assert copy.deepcopy(state) is state and len({state, State.from_json(state.to_json())}) == 1
    with pytest.raises(AttributeError, match="immutable"):
        state.intent = 1


def test_read_and_write_by_path():
    """W-5, W-24: dotted paths into a block; unknown names are refused, absent data is None."""
    state = State.of(FULL)
    assert state.read("descriptions.items")[0]["text"] == "a shore"
    assert state.read("outcome.narrative") == "it rained" and state.read("artifacts.videos") is None
    assert State().read("intent.text") is None and State().read("intent") is None
    assert state.write("outcome.narrative", "dry").get(5)["changes"] == state.get(5)["changes"]
    assert State().write("intent.text", "x").get("intent") == {"text": "x", "focus": []}
    with pytest.raises(ConfigError, match="no field 'itmes'; did you mean 'items'"):
        state.read("descriptions.itmes")
    with pytest.raises(ConfigError, match=r"no block 'artefacts'.*did you mean 'artifacts'"):
        state.read("artefacts.images")
    with pytest.raises(ConfigError, match="empty part"):
        state.read("intent.")


@pytest.mark.parametrize(
    ("block", "value", "named"),
    [
        (1, {"txt": "x"}, "state.intent.txt"),
        (1, {"text": "x" * 200_001}, "state.intent.text"),
        (1, "go", "state.intent"),
        (1, None, "state.intent"),
        (1, {"text": float("nan")}, "state.intent.text"),
        (2, {"requests": [{"id": "r", "slot": "images", "maker": "m", "params": {"x": float("inf")}}]}, "params.x"),
        (2, {"requests": [{"id": "r", "slot": "images", "maker": "m", "params": {"key": object()}}]}, "params.key"),
        (2, {"requests": [{"id": "r", "slot": "images", "maker": "m", "params": {"b": b"raw"}}]}, "params.b"),
        (2, {"requests": [{"id": "r", "slot": "a b", "maker": "m"}]}, r"requests\[0\].slot"),
        (2, {"requests": [{"id": "r", "slot": "a", "maker": "m", "seed": True}]}, r"requests\[0\].seed"),
        (2, {"requests": [{"id": "r", "slot": "a", "maker": "m"}] * 2}, "given twice: r"),
        (3, {"images": [{"id": "12", "media_type": "image/png"}]}, r"artifacts.images\[0\].id"),
        (3, {"images": [{"id": SHA, "media_type": "png"}]}, r"images\[0\].media_type"),
        (3, {"images": [{"id": SHA, "media_type": "image/png", "slot": "audios"}]}, "names slot 'audios'"),
        (4, {"items": [{"artifact_id": SHA, "facts": {1: 2}}]}, r"items\[0\].facts: the key 1 is int"),
        (5, {"changes": [{"op": "destroy", "kind": "entity", "id": "x"}]}, r"outcome.changes\[0\].op"),
        (5, {"changes": [{"op": "add", "kind": "god", "id": "x"}]}, r"outcome.changes\[0\].kind"),
        (5, {"narrative": "\ud800"}, "outcome.narrative.*surrogate"),
        (5, {"changes": [{"op": "add", "kind": "term", "id": "x", "fields": {"n": 2**64}}]}, "65 bits"),
    ],
)
def test_forms_refuse(block, value, named):
    """W-2, W-4, W-22: what is not of the form, live or not JSON is refused, naming block and field."""
    with pytest.raises(ConfigError, match=named):
        State().put(block, value)


def test_bounds():
    deep = {}
    for _ in range(100):
        deep = {"d": deep}
    with pytest.raises(ConfigError, match="nested deeper"):
        State().put(4, {"items": [{"artifact_id": SHA, "facts": deep}]})
    circle = []
    circle.append(circle)
    with pytest.raises(ConfigError, match="holds itself"):
        State().put(4, {"items": [{"artifact_id": SHA, "facts": {"c": circle}}]})
    with pytest.raises(ConfigError, match="more than 8388608"):
        State().put(2, {"requests": [{"id": "r", "slot": "a", "maker": "m", "params": {"p": "x" * 2**23}}]})


def test_block_names():
    assert block_name(1) == block_name("1") == block_name("intent") == "intent" and block_name(5) == "outcome"
    for bad in (0, 6, "0", "six", True, "", 1.0):
        with pytest.raises(ConfigError):
            block_name(bad)
    with pytest.raises(ConfigError, match="given twice"):
        State.of({1: {"text": "a"}, "intent": {"text": "b"}})


def test_json_schemas():
    """W-2: every form is exported as JSON Schema that agrees with the form."""
    import jsonschema

    for block, value in FULL.items():
        schema = block_schema(block)
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"text": "x", "more": 1}, block_schema(1))


def test_schema_extension():
    """W-2: a world may add fields to a block; the five blocks stay, and slots need no declaration."""
    schema = StateSchema({"intent": {"mood": {"type": "string", "enum": ["calm", "wild"]}}})
    state = State.of({1: {"text": "x", "mood": "calm"}}, schema=schema)
    assert state.read("intent.mood") == "calm"
    assert State.from_json(state.to_json(), schema=schema) == state
    assert "mood" in schema.json_schema("intent")["properties"]
    with pytest.raises(ConfigError, match=r"state.intent.mood.*'grim'"):
        state.put(1, {"text": "x", "mood": "grim"})
    with pytest.raises(ConfigError, match=r"intent\.mood"):
        State().put(1, {"text": "x", "mood": "calm"})
    with pytest.raises(ConfigError, match="new slot"):
        StateSchema({"artifacts": {"smells": {}}})
    with pytest.raises(ConfigError, match="has this field already"):
        StateSchema({"intent": {"text": {}}})
    with pytest.raises(ConfigError, match="not a JSON Schema"):
        StateSchema({"intent": {"mood": {"type": "strnig"}}})


def test_artifact_form():
    """W-3: reference, sizes and provenance; a kind of media may carry more fields."""
    made = {"maker": "draw", "graph": "w/creator/draw", "models": ["m"], "seed": 1, "request": 0}
    artifact = Artifact(id=SHA, media_type="audio/wav", slot="audios", duration=2, made_by=made, sample_rate=8000)
    state = State().put("artifacts", {"audios": [artifact.model_dump(mode="json")]})
    (found,) = state.artifacts()
    assert found["sample_rate"] == 8000 and found["duration"] == 2.0 and found["made_by"]["seed"] == 1


def test_parse_json_is_strict():
    for bad in ('{"a": 1, "a": 2}', '{"a": NaN}', "[Infinity]", "{", "[" * 100_000):
        with pytest.raises(ValueError):
            parse_json(bad)
    with pytest.raises(ConfigError, match="not JSON"):
        State.from_json('{"intent": {"text": "a"}, "intent": {"text": "b"}}')
    with pytest.raises(ConfigError, match="mapping of blocks"):
        State.from_json("[]")

"""Language models and pictures behind a real HTTP server, through the real client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from api_server import ApiServer, chat
from jsonschema import Draft202012Validator

from wg_blocks.api.strict import strict_form
from wg_core import Block, Graph
from wg_core.errors import ApiResponseError, ConfigError, OutputContractError
from wg_core.execution.calls import CallLog

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0}, "note": {"type": "string"}},
    "required": ["name", "age"],
}  # fmt: skip
GOOD = {"name": "Mara", "age": 40}


def test_what_is_sent_and_what_comes_back(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-14, F-30: messages, given settings, seed and limit; text and usage."""
    out = api().run(
        {
            "prompt": "Who?",
            "system": "Be short.",
            "context": ["It rains."],
            "params": {"temperature": 0.3, "stop": "number", "seed": 5},
        }
    )
    assert out["text"] == "An answer"  # what follows a stop text is cut off here too
    assert out["usage"] == {
        "calls": 1,
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "context_items": 1,
        "context_dropped": 0,
    }
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer sk-test-0123456789-needle"
    assert body["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is known:\n- It rains.\n\nWho?"},
    ]
    assert (body["model"], body["temperature"], body["stop"], body["max_tokens"]) == ("tale-1", 0.3, ["number"], 256)
    assert 0 <= body["seed"] < 2**31 and "top_p" not in body


def test_seeds(api: Callable[..., Block], server: ApiServer) -> None:
    """01 E-1: equal seeds ask the same, others do not; each text of a batch has its own."""
    block = api()
    answers = [block.run({"prompt": ["a", "a"], "params": {"seed": s}})["text"] for s in (1, 1, 2)]
    seeds = [body["seed"] for _, _, body in server.seen]
    assert answers[0] == answers[1] != answers[2] and seeds[:2] == seeds[2:4] and len(set(seeds)) == 4


def test_unknown_params_are_refused_and_foreign_ones_reported(
    api: Callable[..., Block], server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """01 T-25: nothing is dropped silently; `wire` teaches a server's other settings."""
    with pytest.raises(ConfigError, match=r"params\.temprature .*temperature"):
        api().run({"prompt": "x", "params": {"temprature": 1}})
    assert server.seen == []
    block = api()
    for _ in range(2):
        block.run({"prompt": "x", "params": {"no_repeat_ngram": 4}})
    assert caplog.text.count("params no_repeat_ngram have no effect") == 1
    taught = api(wire={"no_repeat_ngram": "ngrams", "seed": None}, extra_body={"best_of": 2})
    taught.run({"prompt": "x", "params": {"no_repeat_ngram": 4}})
    body = server.seen[-1][2]
    assert body["ngrams"] == 4 and body["best_of"] == 2 and "seed" not in body


def test_a_structure_is_asked_for_strictly_and_checked(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-22: response_format json_schema, strict; what is optional may be null and is then left out."""
    server.replies.append(chat(json.dumps({**GOOD, "note": None})))
    out = api(structure="strict").run({"prompt": "Who?", "schema": SCHEMA})
    assert out["data"] == GOOD == json.loads(out["text"])
    form = server.seen[0][2]["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"] == {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "0 to 20 characters"},
            "age": {"type": "integer", "minimum": 0},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["name", "age", "note"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("schema", "wrapped"),
    [
        ({"anyOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, {"type": "null"}]}, True),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 2}, True),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"enum": ["x", "y"]}}}, False),
    ],
)
def test_strict_forms(schema: dict[str, Any], wrapped: bool, api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-22: any root; closed objects; the answer obeys the schema as it was given."""
    found = strict_form(schema)
    assert found is not None and found[1] is wrapped and found[0]["type"] == "object"
    Draft202012Validator.check_schema(found[0])
    data = api().run({"prompt": "x", "schema": schema})["data"]
    assert list(Draft202012Validator(schema).iter_errors(data)) == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"allOf": [SCHEMA]},
        {"$ref": "#/x"},
        {},
    ],
)
def test_what_cannot_be_strict(schema: dict[str, Any]) -> None:
    assert strict_form(schema) is None


@pytest.mark.parametrize("structure", ["json_schema", "json_object", "prompt"])
def test_other_ways_to_ask_for_a_structure(structure: str, api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-35: servers that know less."""
    server.replies.append(chat("```json\n" + json.dumps(GOOD) + "\n```"))
    assert api(structure=structure).run({"prompt": "Who?", "schema": SCHEMA})["data"] == GOOD
    body = server.seen[0][2]
    assert body.get("response_format", {}).get("type") == (None if structure == "prompt" else structure)
    assert ("obeys this JSON schema" in body["messages"][0]["content"]) is (structure != "json_schema")


def test_broken_structures_are_repaired_a_stated_number_of_times(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-22: the model is told what is wrong; then OutputContractError with the offending text."""
    server.replies.extend([chat("Sure! Mara."), chat('{"name": "Mara", "age": -1}'), chat(json.dumps(GOOD))])
    out = api().run({"prompt": "Who?", "schema": SCHEMA})
    assert out["data"] == GOOD and out["usage"]["calls"] == 3 and out["usage"]["prompt_tokens"] == 33
    repair = server.seen[2][2]["messages"]
    assert [m["role"] for m in repair] == ["user", "assistant", "user"]
    assert "$.age: -1 is less than the minimum" in repair[2]["content"]
    server.replies.extend([chat('{"name": "Mara"}')] * 2)
    with pytest.raises(OutputContractError, match=r"in 2 attempts: \$: 'age' is a required property.*It wrote: .*Mara"):
        api().run({"prompt": "Who?", "schema": SCHEMA, "params": {"max_repairs": 1}})
    assert len(server.seen) == 5


def test_a_structure_that_breaks_off_gets_more_room(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-22: finish_reason length inside a structure is no result, even where it parses."""
    server.replies.extend([chat('{"name": "Ma', "length"), chat(json.dumps(GOOD), "length"), chat(json.dumps(GOOD))])
    assert api().run({"prompt": "Who?", "schema": SCHEMA, "params": {"max_new_tokens": 100}})["data"] == GOOD
    assert [body["max_tokens"] for _, _, body in server.seen] == [100, 150, 200]
    server.replies.extend([chat('{"name": "Ma', "length")] * 3)
    with pytest.raises(OutputContractError, match="it broke off at the limit of tokens"):
        api().run({"prompt": "Who?", "schema": SCHEMA})


def test_free_texts_that_break_off(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-14: at the limit of tokens a free text is a result, to its last sentence if asked; nothing at all is none."""
    server.replies.extend([chat("It rains. The", "length")] * 2 + [chat(" \n", "length")])
    assert api().run({"prompt": "x", "params": {"whole_sentences": True}})["text"] == "It rains."
    assert api().run({"prompt": "x"})["text"] == "It rains. The"
    with pytest.raises(ApiResponseError, match=r"the model wrote nothing; raise params\.max_new_tokens"):
        api().run({"prompt": "x"})


def test_texts_that_no_file_can_hold_are_cleaned(api: Callable[..., Block], server: ApiServer) -> None:
    """03 C-1: lone surrogates and NUL do not reach a state."""
    server.replies.append(chat("a\x00b\ud83dc"))
    assert api().run({"prompt": "x"})["text"] == "a\ufffdb\ufffdc"
    server.replies.append(chat('{"name": "\\ud83d\\u0000", "age": 1}'))
    data = api().run({"prompt": "x", "schema": SCHEMA})["data"]
    assert data["name"] == "\ufffd\ufffd" and json.dumps(data, ensure_ascii=False).encode()


def test_events_usage_costs_and_replay(api: Callable[..., Block], server: ApiServer) -> None:
    """01 E-9, 03 W-21, spec 05: calls are counted and told; recorded ones answer again without the server."""
    graph, events = Graph("g"), []
    graph.add_node(api(prices={"prompt": 1.0, "completion": 2.0}), "llm")
    graph.expose_input("llm", "prompt", name="prompt")
    graph.expose_output("llm", "text", name="text")
    log = CallLog()
    hook = [lambda e: events.append(e) if e.kind == "model_call" else None]
    first = graph.run({"prompt": "x"}, seed=3, callbacks=hook, calls=log)
    data = events[0].data
    assert data["model"] == "openai/tale-1" and data["answer"] == first["text"] and data["seconds"] > 0
    assert data["cost"] == pytest.approx((11 + 14) / 1e6) and data["prompt_tokens"] == 11
    assert "needle" not in json.dumps(data) + json.dumps(log.calls) + repr(graph.nodes["llm"].child.__dict__)
    assert graph.run({"prompt": "x"}, seed=3, calls=CallLog(json.loads(json.dumps(log.calls)))) == first
    assert len(server.seen) == 1


def test_pictures_are_looked_at(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-15: one picture one text, a batch a list; sent as PNG."""
    out = api("vlm/api").run({"image": np.zeros((2, 3, 4, 5)), "prompt": ["What?", "And this?"], "schema": SCHEMA})
    assert len(out["text"]) == len(out["data"]) == 2 and out["usage"]["calls"] == 2
    parts = server.seen[1][2]["messages"][-1]["content"]
    assert parts[0] == {"type": "text", "text": "And this?"}
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert isinstance(api("vlm/api").run({"image": np.zeros((1, 3, 4, 5))})["text"], str)


def test_embeddings(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-16: in the order of the texts, whatever the order of the answer."""
    block = api("embedding/api")
    assert block.run({"input": ["a", "bbb"]})["embedding"] == [[1.0, 0.5, -1.0], [3.0, 0.5, -1.0]]
    assert block.run({"input": "cc"})["embedding"] == [2.0, 0.5, -1.0]
    assert api("embedding/api", dimensions=3).run({"input": []})["embedding"] == []
    assert len(server.seen) == 2


def test_pictures_are_made_and_changed(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-20: as bytes in the answer; with a picture given, as an edit."""
    out = api("generator/api", size="12x8").run({"prompt": "a pier"})
    assert out["image_out"].shape == (1, 3, 8, 12) and out["image_out"].max() == np.float32(100 / 255)
    path, _, body = server.seen[0]
    assert path == "/v1/images/generations" and body["response_format"] == "b64_json" and "seed" not in body
    api("generator/api", send_seed=True).run({"prompt": "a pier", "image": out["image_out"], "seed": 7})
    path, headers, raw = server.seen[1]
    assert path == "/v1/images/edits" and headers["content-type"].startswith("multipart/form-data; boundary=")
    assert b"\x89PNG" in raw and b'name="seed"\r\n\r\n7' in raw
    with pytest.raises(ConfigError, match=r"params\.sise"):
        api("generator/api").run({"prompt": "x", "params": {"sise": "1x1"}})

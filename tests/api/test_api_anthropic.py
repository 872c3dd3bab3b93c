"""The second wire format: Messages, through its own package, against a server of that format on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from api_server import KEY, ApiServer, events, status
from test_api_streams import graph_of, read
from test_api_tools import TOOLS

from wg_core import Block
from wg_core.errors import ApiRateLimitError, ApiResponseError, ConfigError, NodeExecutionError, OutputContractError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
}
USAGE = {"input_tokens": 9, "cache_read_input_tokens": 2, "cache_creation_input_tokens": None, "output_tokens": 7}


def said(*content: Any, stop: str | None = "end_turn", **more: Any) -> dict[str, Any]:
    """A reply with these parts; texts are parts of text."""
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "tale-1", "content": parts}
    return {"json": {**message, "stop_reason": stop, "stop_sequence": None, "usage": USAGE, **more}}


def use(name: str, given: Any, id: str = "toolu_1") -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": given}


def stream(*blocks: Any, stop: str | None = "end_turn", end: bool = True) -> list[dict[str, Any]]:
    """The events of a message: texts word by word, tools with their arguments in halves."""
    start = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tale-1",
        "content": [],
        "stop_reason": None,
    }
    out: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**start, "usage": {**USAGE, "output_tokens": 1}}}
    ]
    for i, block in enumerate(blocks):
        text = isinstance(block, str)
        begun = {"type": "text", "text": ""} if text else {**block, "input": {}}
        out += [{"type": "content_block_start", "index": i, "content_block": begun}, {"type": "ping"}]
        whole = block if text else json.dumps(block["input"])
        kind, key = ("text_delta", "text") if text else ("input_json_delta", "partial_json")
        for part in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
            out.append({"type": "content_block_delta", "index": i, "delta": {"type": kind, key: part}})
        out.append({"type": "content_block_stop", "index": i})
    if stop:
        out.append({"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 7}})
    return [*out, {"type": "message_stop"}] if end else out


@pytest.fixture
def messages(api: Callable[..., Block], server: ApiServer) -> Callable[..., Block]:
    """Builds a block behind the server, which speaks Messages."""

    def build(block_type: str = "llm/api", **config: Any) -> Block:
        url = server.url.removesuffix("/v1")
        return api(block_type, **{"provider": "anthropic", "endpoint_url": url, **config})

    return build


def test_what_is_sent_and_what_comes_back(messages: Callable[..., Block], server: ApiServer) -> None:
    """01 T-14, F-30, F-35, 04 X-1: same ports, another wire; usage with what the provider's cache read."""
    server.replies.append(said("It ", "rains."))
    params = {"temperature": 0.3, "top_k": 5, "stop": "END", "max_new_tokens": 99}
    asked = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
        {"role": "user", "content": "And?"},
    ]
    out = messages(extra_body={"metadata": {"user_id": "u"}}).run(
        {"prompt": asked, "system": "Be short.", "params": params}
    )
    assert out["text"] == "It rains." and (out["usage"]["prompt_tokens"], out["usage"]["completion_tokens"]) == (11, 7)
    path, headers, body = server.seen[0]
    assert path == "/v1/messages" and headers["x-api-key"] == KEY and headers["anthropic-version"]
    assert "authorization" not in headers
    assert body["system"] == "Be short." and [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][2]["content"] == [{"type": "text", "text": "And?"}]
    sent = ("model", "temperature", "top_k", "stop_sequences", "max_tokens", "metadata")
    assert [body[n] for n in sent] == ["tale-1", 0.3, 5, ["END"], 99, {"user_id": "u"}] and "seed" not in body


def test_a_structure_is_the_one_tool_that_must_be_called(messages: Callable[..., Block], server: ApiServer) -> None:
    """03 W-22: strict where strict decoding can say it; what it cannot is checked here; any root."""
    server.replies.append(said(use("answer", {"name": "Mara", "age": None}), stop="tool_use"))
    assert messages().run({"prompt": "Who?", "schema": SCHEMA})["data"] == {"name": "Mara"}
    body = server.seen[0][2]
    assert body["tool_choice"] == {"type": "tool", "name": "answer", "disable_parallel_tool_use": True}
    (tool,) = body["tools"]
    assert tool["strict"] is True and tool["input_schema"]["additionalProperties"] is False
    assert "minimum" not in tool["input_schema"]["properties"]["age"]["anyOf"][0]
    free = {"type": "object", "additionalProperties": {"type": "number"}}
    server.replies.append(said(use("answer", {"a": 1}), stop="tool_use"))
    assert messages().run({"prompt": "x", "schema": free})["data"] == {"a": 1}
    assert "strict" not in server.seen[1][2]["tools"][0] and server.seen[1][2]["tools"][0]["input_schema"] == free
    server.replies.append(said(use("answer", {"answer": ["a", "b"]}), stop="tool_use"))
    listed = {"type": "array", "items": {"type": "string"}, "maxItems": 2}
    assert messages(structure="json_schema").run({"prompt": "x", "schema": listed})["data"] == ["a", "b"]
    server.replies.extend(
        [
            said("Mara."),
            said(use("answer", {"age": 3}), stop="tool_use"),
            said(use("answer", {"name": "M"}), stop="max_tokens"),
        ]
    )
    with pytest.raises(OutputContractError, match="broke off at the limit of tokens"):
        messages().run({"prompt": "Who?", "schema": SCHEMA})
    server.replies.append(said('{"name": "Mara"}'))
    assert messages(structure="prompt").run({"prompt": "Who?", "schema": SCHEMA})["data"] == {"name": "Mara"}
    assert "tools" not in server.seen[-1][2] and "JSON schema" in server.seen[-1][2]["system"]


def test_a_tool_may_have_the_name_of_the_structure(messages: Callable[..., Block], server: ApiServer) -> None:
    """01 T-17, 03 W-22: a call of it is a call, not the answer."""
    tools = [{**TOOLS[1], "name": "answer"}]
    server.replies.extend([said(use("answer", {}), stop="tool_use"), said(use("answer_", {"name": "Mara"}), stop="tool_use")])
    called = messages().run({"prompt": "Who?", "schema": SCHEMA, "tools": tools})
    assert called["tool_calls"][0]["name"] == "answer" and "data" not in called
    assert messages().run({"prompt": "Who?", "schema": SCHEMA, "tools": tools})["data"] == {"name": "Mara"}
    assert [t["name"] for t in server.seen[0][2]["tools"]] == ["answer", "answer_"]


def test_tools_and_their_results(messages: Callable[..., Block], server: ApiServer) -> None:
    """01 T-17: parallel calls with their ids; results of one turn go back as one message."""
    server.replies.append(
        said("Let me see.", use("read_entity", {"id": "mara"}), use("wait", {}, "toolu_2"), stop="tool_use")
    )
    out = messages().run({"prompt": "Who?", "tools": TOOLS})
    assert out["text"] == "Let me see." and [c["id"] for c in out["tool_calls"]] == ["toolu_1", "toolu_2"]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "done"} for c in out["tool_calls"]]
    turn = {"role": "assistant", "content": out["text"], "tool_calls": out["tool_calls"]}
    server.replies.append(said("She is a mason."))
    assert messages().run({"prompt": [{"role": "user", "content": "Who?"}, turn, *results], "tools": TOOLS})["text"]
    sent = server.seen[1][2]
    assert [t["name"] for t in sent["tools"]] == ["read_entity", "wait"] and "input_schema" in sent["tools"][0]
    assert [p["type"] for p in sent["messages"][1]["content"]] == ["text", "tool_use", "tool_use"]
    assert [p["tool_use_id"] for p in sent["messages"][2]["content"]] == ["toolu_1", "toolu_2"]
    server.replies.append(said(use("read_entity", {"id": 7}), stop="tool_use"))
    with pytest.raises(OutputContractError, match="not of type 'string'"):
        messages().run({"prompt": "Who?", "tools": TOOLS, "params": {"max_repairs": 0}})


def test_pictures_are_looked_at(messages: Callable[..., Block], server: ApiServer) -> None:
    """01 T-15."""
    server.replies.append(said("A grey square."))
    assert messages("vlm/api").run({"image": np.zeros((1, 3, 4, 5)), "prompt": "What?"})["text"] == "A grey square."
    text, image = server.seen[0][2]["messages"][0]["content"]
    assert text["text"] == "What?" and image["source"]["media_type"] == "image/png"
    assert image["source"]["data"].startswith("iVBOR")


def test_a_stream(messages: Callable[..., Block], server: ApiServer) -> None:
    """02 G-40, 03 W-21: pieces, usage from its two events; tools and structures are not streamed."""
    server.replies.append(events(*stream("It rained in the harbour."), named=True))
    pieces, out = read(graph_of(messages()), {"prompt": "x"})
    assert len(pieces) == 2 and out["text"] == "".join(pieces) == "It rained in the harbour."
    assert (out["usage"]["prompt_tokens"], out["usage"]["completion_tokens"]) == (11, 7)
    assert server.seen[0][2]["stream"] is True


BAD_STREAMS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no stop reason": (stream("half", stop=None), "ended without a stop_reason"),
    "no end": (stream("half", end=False), "ended without a stop_reason and message_stop"),
    "an error": ([*stream("half", stop=None, end=False), {"type": "error", "error": {"type": "api_error", "message": "it fell"}}], "it fell"),
    "a refusal": (stream("I", stop="refusal"), "the model refused"),
    "a pause": (stream("I", stop="pause_turn"), "not whole"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_STREAMS)
def test_a_stream_that_is_no_answer(fault: str, messages: Callable[..., Block], server: ApiServer) -> None:
    """01 A-2, 03 W-21."""
    given, says = BAD_STREAMS[fault]
    server.replies.append(events(*given, named=True))
    with pytest.raises(NodeExecutionError, match=says):
        read(graph_of(messages()), {"prompt": "x"})
    assert len(server.seen) == 1


BAD_ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "a refusal": (said("", stop="refusal", stop_details={"explanation": "harm"}), "the model refused: harm"),
    "a pause": (said("I", stop="pause_turn"), r"not whole \(stop_reason 'pause_turn'\)"),
    "no stop": (said("I", stop=None), "not whole"),
    "no content": (said(content=None), "no content"),
    "another part": (said({"type": "server_tool_use"}), "'server_tool_use'.* is no text"),
    "a page": ({"raw": b"<html></html>"}, "no JSON"),
    "a bad request": (
        status(400, "tools.0.input_schema: bad"),
        "answers 400: tools.0.input_schema: bad; see structure",
    ),
    "a refused key": (status(401, KEY), r"refuses the key \(401\)"),
}


@pytest.mark.parametrize("fault", BAD_ANSWERS)
def test_an_answer_that_is_none(fault: str, messages: Callable[..., Block], server: ApiServer) -> None:
    """01 A-2, F-33: a named error, without the key."""
    reply, says = BAD_ANSWERS[fault]
    server.replies.append(reply)
    with pytest.raises(ApiResponseError, match=says) as caught:
        messages().run({"prompt": "x"})
    assert KEY not in str(caught.value) and "provider anthropic at 127.0.0.1" in str(caught.value)
    assert len(server.seen) == 1


def test_overload_is_tried_again_and_an_empty_purse_is_not(messages: Callable[..., Block], server: ApiServer) -> None:
    """03 W-21."""
    server.replies.extend(
        [{"status": 529, "json": {"error": {"type": "overloaded_error", "message": "busy"}}}, said("Here.")]
    )
    assert messages().run({"prompt": "x"})["text"] == "Here."
    server.replies.append({"status": 402, "json": {"error": {"type": "billing_error", "message": "no credit"}}})
    with pytest.raises(ApiRateLimitError, match="quota is used up"):
        messages().run({"prompt": "x"})
    assert len(server.seen) == 3


def test_nothing_of_the_environment_travels(
    messages: Callable[..., Block], server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """01 F-33: its own variables hold for its own address only."""
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_PROFILE"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", f"X-Mine: {KEY}")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    server.replies.append(said("Here."))
    messages(api_key_env=None).run({"prompt": "x"})
    assert KEY not in str(server.seen[0][1]) + str(server.seen[0][2])


def test_what_it_does_not_offer(messages: Callable[..., Block]) -> None:
    """01 F-32: named, never something else instead."""
    with pytest.raises(ConfigError, match="provider anthropic offers no embeddings"):
        messages("embedding/api").run({"input": "x"})
    with pytest.raises(ConfigError, match="provider anthropic has no option 'wire'"):
        messages(options={"wire": "chat"}).run({"prompt": "x"})


WITHOUT = """
import sys
sys.modules["anthropic"] = None
from wg_core.assembly.registry import default_registry
from wg_core.errors import MissingExtraError
words = {"provider": "anthropic", "model_id": "m", "endpoint_url": "http://127.0.0.1:1"}
block = default_registry().build({"block_type": "llm/api", "config": words})
try:
    block.run({"prompt": "x"})
except MissingExtraError as error:
    assert "generative-worlds[anthropic]" in str(error), error
else:
    raise AssertionError("it ran")
"""


def test_the_extra_is_named_where_it_is_missing() -> None:
    """01 F-35: MissingExtraError, at the first call."""
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=60)

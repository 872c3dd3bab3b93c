"""OpenAI's newer wire format, chosen by an option of the provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from api_server import ApiServer, events
from test_api_streams import graph_of, read
from test_api_tools import TOOLS

from wg_core import Block
from wg_core.errors import ApiResponseError, ConfigError, NodeExecutionError


def message(text: str, **part: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text, **part}]}


def response(*output: Any, status: str = "completed", **more: Any) -> dict[str, Any]:
    return {
        "id": "r",
        "status": status,
        "output": list(output),
        "usage": {"input_tokens": 11, "output_tokens": 7},
        **more,
    }


@pytest.fixture
def responses(api: Callable[..., Block]) -> Callable[..., Block]:
    """Builds a block whose provider speaks Responses."""

    def build(block_type: str = "llm/api", **config: Any) -> Block:
        return api(block_type, **{"options": {"wire": "responses"}, **config})

    return build


def test_what_is_sent_and_what_comes_back(responses: Callable[..., Block], server: ApiServer) -> None:
    """01 F-35, T-14, 03 W-22: nothing is kept at the server; structures, limits and usage."""
    server.replies.append({"json": response({"type": "reasoning"}, message('{"n": 3}'))})
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    out = responses().run({"prompt": "x", "system": "Be short.", "schema": schema, "params": {"temperature": 0.2}})
    assert out["data"] == {"n": 3} and (out["usage"]["prompt_tokens"], out["usage"]["completion_tokens"]) == (11, 7)
    path, _, body = server.seen[0]
    assert path == "/v1/responses" and body["store"] is body["stream"] is False and body["max_output_tokens"] == 256
    assert [m["role"] for m in body["input"]] == ["system", "user"] and "seed" not in body
    form = body["text"]["format"]
    assert (form["type"], form["name"], form["strict"]) == ("json_schema", "answer", True)


def test_tools_and_pictures(responses: Callable[..., Block], server: ApiServer) -> None:
    """01 T-15, T-17."""
    call = {"type": "function_call", "call_id": "c1", "name": "read_entity", "arguments": '{"id": "mara"}'}
    server.replies.extend([{"json": response(call)}, {"json": response(message("A mason."))}])
    out = responses().run({"prompt": "Who?", "tools": TOOLS})
    assert out["tool_calls"] == [{"id": "c1", "name": "read_entity", "arguments": {"id": "mara"}}]
    turn = {"role": "assistant", "content": "", "tool_calls": out["tool_calls"]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "Known."}
    responses().run({"prompt": [{"role": "user", "content": "Who?"}, turn, result], "tools": TOOLS})
    sent = server.seen[1][2]["input"]
    assert [i.get("type", i.get("role")) for i in sent] == ["user", "function_call", "function_call_output"]
    server.replies.append({"json": response(message("Grey."))})
    responses("vlm/api").run({"image": np.zeros((1, 3, 4, 5))})
    assert server.seen[2][2]["input"][0]["content"][1]["image_url"].startswith("data:image/png;base64,iVBOR")


def test_a_stream(responses: Callable[..., Block], server: ApiServer) -> None:
    """02 G-40."""
    said = [{"type": "response.output_text.delta", "delta": d} for d in ("It ", "rained.")]
    end = {"type": "response.completed", "response": response(message("It rained."))}
    server.replies.append(events({"type": "response.created"}, *said, end, named=True))
    pieces, out = read(graph_of(responses()), {"prompt": "x"})
    assert pieces == ["It ", "rained."] and out["text"] == "It rained." and out["usage"]["completion_tokens"] == 7
    for wrong, says in (
        (said, "ended without a response.completed"),
        ([*said, {"type": "error", "message": "it fell"}], "it fell"),
        ([{"type": "response.failed", "response": response(status="failed")}], "not whole"),
    ):
        server.replies.append(events(*wrong, named=True))
        with pytest.raises(NodeExecutionError, match=says):
            read(graph_of(responses()), {"prompt": "x"})


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (response(status="failed"), "status 'failed'"),
        (response(status="incomplete", incomplete_details={"reason": "content_filter"}), "content filter"),
        (response(), "no message"),
        (response({"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}), r"the model refused: No\."),
        ({"status": "completed"}, "no output"),
        (response({"type": "function_call", "name": "x"}), "no call_id, name or arguments"),
    ],
)
def test_an_answer_that_is_none(reply: Any, says: str, responses: Callable[..., Block], server: ApiServer) -> None:
    """01 A-2."""
    server.replies.append({"json": reply})
    with pytest.raises(ApiResponseError, match=says):
        responses().run({"prompt": "x", "tools": TOOLS})


def test_the_wire_is_one_of_two(responses: Callable[..., Block], server: ApiServer) -> None:
    """01 F-32."""
    with pytest.raises(ConfigError, match="option wire is chat or responses, not 'assistants'"):
        responses(options={"wire": "assistants"}).run({"prompt": "x"})
    cut = response(message("It rains. The"), status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    server.replies.append({"json": cut})
    assert responses().run({"prompt": "x", "params": {"whole_sentences": True}})["text"] == "It rains."

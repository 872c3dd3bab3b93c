"""Native tool calls: offered as the provider has them, their calls checked, their results told with the ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from api_server import ApiServer, chat

from wg_blocks.api import close_clients
from wg_core import Block
from wg_core.assembly.registry import default_registry
from wg_core.errors import ApiResponseError, ConfigError, OutputContractError, PortValueError

TOOLS = [
    {
        "name": "read_entity",
        "description": "What is known of one.",
        "parameters": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    },
    {"name": "wait", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
]


def calls(*given: tuple[str, str, str]) -> dict[str, Any]:
    """A reply that calls tools: `(id, name, arguments)`."""
    said = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in given]
    return chat(None, "tool_calls", tool_calls=said)


def test_tools_are_offered_and_parallel_calls_come_with_their_ids(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-14, T-17, 04 X-1: calls in order, arguments as data; their results go back under the same ids."""
    server.replies.append(calls(("c1", "read_entity", '{"id": "mara"}'), ("c2", "wait", "")))
    out = api().run({"prompt": "Who?", "tools": TOOLS})
    assert out["text"] == "" and out["tool_calls"] == [
        {"id": "c1", "name": "read_entity", "arguments": {"id": "mara"}},
        {"id": "c2", "name": "wait", "arguments": {}},
    ]
    sent = server.seen[0][2]["tools"]
    assert [t["function"]["name"] for t in sent] == ["read_entity", "wait"] and sent[0]["type"] == "function"
    told = [{"role": "tool", "tool_call_id": i, "content": t} for i, t in (("c1", "A mason."), ("c2", "done"))]
    asked = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "", "tool_calls": out["tool_calls"]}]
    again = api().run({"prompt": [*asked, *told], "tools": TOOLS})
    assert again["text"].startswith("An answer") and "tool_calls" not in again
    messages = server.seen[1][2]["messages"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "read_entity", "arguments": '{"id": "mara"}'}
    assert messages[2] == {"role": "tool", "tool_call_id": "c1", "content": "A mason."}


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (calls(("c1", "read_entity", '{"id": "ma')), "arguments of read_entity are no JSON"),
        (calls(("c1", "read_entity", "[1]")), "arguments of read_entity: they are no object"),
        (calls(("c1", "read_entity", '{"id": 7}')), "7 is not of type 'string'"),
        (calls(("c1", "read_entty", "{}")), "no tool 'read_entty'; did you mean 'read_entity'"),
        (calls(("c1", "wait", "{}"), ("c1", "wait", "{}")), "no id of its own"),
    ],
)
def test_calls_that_are_none(reply: dict[str, Any], says: str, api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-22: the model is told and asked again a stated number of times, then it is an error; never a call."""
    server.replies.extend([reply, calls(("c9", "wait", "{}"))])
    assert api().run({"prompt": "x", "tools": TOOLS})["tool_calls"][0]["id"] == "c9"
    assert says.split("; ")[0].split("'")[0] in server.seen[1][2]["messages"][-1]["content"]
    server.replies.append(reply)
    with pytest.raises(OutputContractError, match=says):
        api().run({"prompt": "x", "tools": TOOLS, "params": {"max_repairs": 0}})


def test_a_call_that_nobody_can_read(api: Callable[..., Block], server: ApiServer) -> None:
    """01 A-2."""
    server.replies.append(chat(None, "tool_calls", tool_calls=[{"id": "c1", "function": {"name": "wait"}}]))
    with pytest.raises(ApiResponseError, match="tool call of its answer has no id, name or arguments"):
        api().run({"prompt": "x", "tools": TOOLS})


def test_tools_that_are_none(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-25: refused before anything is sent."""
    for tools, error in (
        ([{"name": "wait"}], PortValueError),
        ([{"name": "a b", "parameters": {}}], PortValueError),
        ([TOOLS[1], TOOLS[1]], PortValueError),
        ([{"name": "a", "parameters": {"type": "strange"}}], ConfigError),
    ):
        with pytest.raises(error):
            api().run({"prompt": "x", "tools": tools})
    assert server.seen == []


def test_the_fake_provider_calls_tools_by_script() -> None:
    """01 T-23."""
    script = [{"tool_calls": [{"name": "wait", "arguments": {}}]}, "done"]
    words = {"provider": "fake", "model_id": "m", "options": {"script": script}}
    block = default_registry().build({"block_type": "llm/api", "config": words})
    assert block.run({"prompt": "x", "tools": TOOLS})["tool_calls"] == [
        {"id": "call_0", "name": "wait", "arguments": {}}
    ]
    assert block.run({"prompt": "x", "tools": TOOLS})["text"] == "done"
    assert json.dumps(block.to_config())
    close_clients()

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
        (calls(("c1", "read_entity", '{"id": NaN}')), "NaN is no JSON number"),
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


def test_calls_that_are_none_are_handed_on_where_that_is_asked_for(api: Callable[..., Block], server: ApiServer) -> None:
    """02 G-49: with `tool_errors: result` each call comes with what is wrong with it, and the others stay good."""
    server.replies.append(calls(("c1", "read_entity", '{"id": "ma'), ("c2", "a b/c", "[1]"), ("c3", "wait", "")))
    broken, unknown, good = api().run({"prompt": "x", "tools": TOOLS, "tool_errors": "result"})["tool_calls"]
    assert broken["arguments"] == '{"id": "ma' and "no JSON" in broken["error"]
    assert (unknown["name"], unknown["arguments"]) == ("a_b_c", "[1]") and "no tool 'a b/c'" in unknown["error"]
    assert good == {"id": "c3", "name": "wait", "arguments": {}} and len(server.seen) == 1
    server.replies.append({"json": {**calls(("c1", "wait", "{")) ["json"]}})
    server.replies[0]["json"]["choices"][0]["finish_reason"] = "length"
    (cut,) = api().run({"prompt": "x", "tools": TOOLS, "tool_errors": "result"})["tool_calls"]
    assert "no JSON" in cut["error"] and "broke off at the limit of tokens" in cut["error"]


def test_calls_without_an_id_of_their_own_are_given_one(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-41: some servers give none, or one for all; results are told by id."""
    server.replies.append(calls(*((i, "wait", "{}") for i in ("c", "c", "", "call_1"))))
    ids = [call["id"] for call in api().run({"prompt": "x", "tools": TOOLS})["tool_calls"]]
    assert ids[0] == "c" and ids[3] == "call_1" and len(set(ids)) == 4 and all(ids)


def test_whether_tools_may_be_called_is_told(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-17: `tool_choice`; a word that is none is refused before anything is sent."""
    for choice in ("auto", "none", "required"):
        api().run({"prompt": "x", "tools": TOOLS, "tool_choice": choice})
    assert [body.get("tool_choice") for _, _, body in server.seen] == [None, "none", "required"]
    for port in ("tool_choice", "tool_errors"):
        with pytest.raises(PortValueError, match=port):
            api().run({"prompt": "x", "tools": TOOLS, port: "perhaps"})
    assert len(server.seen) == 3


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

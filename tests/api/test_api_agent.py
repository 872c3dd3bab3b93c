"""An agent with native tool calls over sockets: through the real clients, to a server that is as strict as providers are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_server import KEY, ApiServer
from wires import WIRES, Call, ChatWire

from wg_core import Graph
from wg_core.errors import AgentStepLimitError, ApiResponseError, NodeExecutionError, OutputContractError
from wg_core.execution.calls import CallLog
from wg_core.execution.context import Event

Build = Callable[..., Graph]


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> ChatWire:
    return WIRES[request.param]


@pytest.fixture
def agent(wire: ChatWire, server: ApiServer) -> Build:
    """Builds an agent whose model is behind the server, and its tools."""
    url = server.url.removesuffix("/v1") if wire.path == "/messages" else server.url
    where = {"backend": "api", "endpoint_url": url, "model_id": "tale-1", "api_key_env": "WG_TEST_KEY", "max_retries": 0}
    llm = {"block_type": "llm/api", "config": {**where, **wire.config}}

    def build(*tools: str, **config: Any) -> Graph:
        part = {"block_type": "agent/llm", "config": {"llm": llm, "calling": "native", **config}}
        graph = Graph.from_template("agent_with_tools", agent=part, tools=list(tools or ("tool/calc", "tool/echo")))
        graph.expose_output("agent", "status", "status")
        return graph

    return build


def calc(call_id: str, expression: str) -> Call:
    return call_id, "calc", json.dumps({"expression": expression})


def results(wire: ChatWire, body: Any) -> dict[str, str]:
    """What a request tells of tools, by the id of the call."""
    return {value[0]: value[1] for kind, value in wire.parts(body) if kind == "result"}


def test_a_request_goes_through_tools_to_its_answer(agent: Build, wire: ChatWire, server: ApiServer) -> None:
    """01 F-41, T-17, 02 G-48, G-50: schemas go out, parallel calls come back, results return under their ids."""
    server.replies.extend(
        [
            wire.says("Let me see.", calc("c_1", "6 * 7"), ("c_2", "echo", '{"value": "tide"}'), calc("c_3", "1 / 0")),
            wire.says(None, calc("c_4", "42 + 1")),
            wire.says("It is 43."),
        ]
    )
    graph = agent(system="You are a clerk.")
    out = graph.run({"prompt": "six times seven, and one?"})
    assert out["response"] == "It is 43."
    first, second, third = (body for _, _, body in server.seen)
    offered = wire.offered(first)
    assert list(offered) == ["calc", "echo"] and wire.choice(first) == "auto"
    assert offered["calc"] == graph.agents()["agent"][0].spec.parameters
    told = results(wire, second)
    assert told["c_1"] == "calc (c_1) says: 42" and told["c_2"] == "echo (c_2) says: tide"
    assert told["c_3"].startswith("calc (c_3) failed: cannot evaluate '1 / 0'")
    assert list(results(wire, third)) == ["c_1", "c_2", "c_3", "c_4"]
    assert [v[0] for k, v in wire.parts(third) if k == "call"] == ["c_1", "c_2", "c_3", "c_4"]
    if wire.path == "/messages":
        assert [v[2] for k, v in wire.parts(second) if k == "result"] == [False, False, True]
    status = out["status"]
    assert (status["ended"], status["calls"], status["tokens"]) == ("answer", 4, 3 * 18)
    assert [c["call_id"] for c in status["trail"] if "error" in c] == ["c_3"]
    assert KEY not in json.dumps(graph.to_config()) + json.dumps(graph.nodes["agent"].child.state_dict())


def test_what_a_model_calls_wrongly_is_told_to_it(agent: Build, wire: ChatWire, server: ApiServer) -> None:
    """02 G-49: no JSON, an unknown tool, arguments of another schema; the good call beside them runs, nothing crashes."""
    server.replies.extend(
        [
            wire.says(None, ("a", "calc", '{"expression": "1'), ("b", "functions.calk", "{}"), ("c", "calc", '{"x": 1}'), calc("d", "2 + 2")),
            wire.says(None, ("e", "calc", "7"), finish="length"),
            wire.says("Four."),
        ]
    )
    events: list[Event] = []
    out = agent().run({"prompt": "go"}, callbacks=[events.append])
    assert out["response"] == "Four." and len(server.seen) == 3, "nothing was asked twice"
    told = results(wire, server.seen[1][2])
    assert "no JSON" in told["a"] or "no object" in told["a"]
    assert "there is no tool" in told["b"] and "'expression' is a required property" in told["c"] and told["d"].endswith("says: 4")
    assert "no object" in results(wire, server.seen[2][2])["e"]
    assert [c["call_id"] for c in out["status"]["trail"] if "error" in c] == ["a", "b", "c", "e"]
    ends = [e for e in events if e.kind == "tool_end"]
    assert ["error" in e.data for e in ends] == [True, True, True, False, True], "hooks are told of every call"
    server.replies.append(wire.says(None, ("a", "calc", "{")))
    with pytest.raises(NodeExecutionError, match=r"no JSON|no object"):
        agent().run({"prompt": "go"}, tool_errors="raise")


def test_limits_hold_whatever_the_model_calls(agent: Build, wire: ChatWire, server: ApiServer) -> None:
    """01 E-10: calls over `max_calls` are not run, then only an answer is asked for; a model that must look first is told so."""
    server.replies.extend([wire.says(None, *(calc(f"c{i}", f"{i} + 0") for i in range(3))), wire.says("Enough.")])
    graph = agent(max_calls=2, min_calls=1)
    out = graph.run({"prompt": "go"})
    assert out["response"] == "Enough." and out["status"]["ended"] == "calls" and out["status"]["calls"] == 2
    first, second = (body for _, _, body in server.seen)
    assert wire.choice(first) == "required" and wire.choice(second) == "none"
    assert wire.offered(second) == wire.offered(first), "a conversation with calls needs their tools"
    assert "not run: at most 2 calls" in results(wire, second)["c2"]
    server.replies.extend([wire.says(None, calc("a", "1"), calc("b", "2")), wire.says(None, calc("c", "3"))])
    with pytest.raises(NodeExecutionError, match="may only answer, but it calls calc") as caught:
        graph.run({"prompt": "again"})
    assert isinstance(caught.value.__cause__, OutputContractError)
    eager = agent(max_calls=50)
    server.replies.extend([wire.says(None, calc(f"x{i}", "1")) for i in range(2)])
    with pytest.raises(AgentStepLimitError):
        eager.run({"prompt": "go"}, max_agent_steps=2)
    server.replies.append(wire.says("Well then."))
    assert eager.run({"prompt": "and now?"})["response"] == "Well then.", "calls that were left open are closed"
    assert "the run ended before" in results(wire, server.seen[-1][2])["x1"]


def test_a_session_goes_on_where_it_was_saved(agent: Build, wire: ChatWire, server: ApiServer, tmp_path: Path) -> None:
    """01 F-42, A-11: saved between call and result, loaded, and continued against the server; the key is in no file."""
    graph = agent()
    server.replies.append(wire.says(None, calc("c_1", "6 * 7"), calc("c_2", "6 * 8")))

    def hook(event: Event) -> None:
        if event.kind == "tool_end" and event.data["call_id"] == "c_1":
            graph.save(tmp_path / "mid")

    server.replies.append(wire.says("42 and 48."))
    graph.run({"prompt": "go"}, callbacks=[hook])
    loaded = Graph.load(tmp_path / "mid")
    again = loaded.nodes["agent"].child
    again.bind_tools([tool.spec for tool in loaded.agents()["agent"]])
    server.replies.append(wire.says("As I said."))
    told = [{"call_id": f"c_{i}", "tool_id": "calc", "result": r} for i, r in ((1, 42), (2, 48))]
    assert again.forward({"context": "go", "tool_results": told})["response"] == "As I said."
    assert list(wire.parts(server.seen[-1][2])) == list(wire.parts(server.seen[-2][2]))
    whole = Graph.load(tmp_path / "mid")
    server.replies.append(wire.says("New."))
    assert whole.run({"prompt": "something else"})["response"] == "New."
    assert "the run ended before" in results(wire, server.seen[-1][2])["c_2"]
    assert KEY.encode() not in b"".join(f.read_bytes() for f in (tmp_path / "mid").rglob("*") if f.is_file())


def test_a_long_conversation_stays_one_that_providers_take(agent: Build, wire: ChatWire, server: ApiServer) -> None:
    """01 F-42: what is forgotten leaves no call without its result, and the user begins; ids may come again."""
    graph = agent(history=6)
    for i in range(5):
        server.replies.extend([wire.says(None, calc("same", f"{i} + 1"), calc("other", "1 / 0")), wire.says(f"Answer {i}.")])
        out = graph.run({"prompt": f"question {i}"})
        assert out["response"] == f"Answer {i}."
        assert [("error" in c) for c in out["status"]["trail"]] == [False, True]
    assert len(server.seen[-1][2][{"/responses": "input"}.get(wire.path, "messages")]) <= 8
    server.replies.append({"status": 400, "json": {"error": {"message": "no such model"}}})
    with pytest.raises(NodeExecutionError, match="no such model") as caught:
        graph.run({"prompt": "and?"})
    assert isinstance(caught.value.__cause__, ApiResponseError)
    server.replies.append(wire.says("Here again."))
    assert graph.run({"prompt": "still there?"})["response"] == "Here again."


def test_every_driver_and_a_replay(agent: Build, wire: ChatWire, server: ApiServer) -> None:
    """02 G-48: asynchronously and as a stream (an agent's answer is one piece); a replay asks nobody."""
    def turns() -> list[dict[str, Any]]:
        return [wire.says(None, calc("c", "6 * 7")), wire.says("42.")]

    graph = agent(memory="run")
    server.replies.extend(turns())
    assert asyncio.run(graph.run_async({"prompt": "go"}))["response"] == "42."
    server.replies.extend(turns())
    chunks = list(graph.stream({"prompt": "go"}))
    assert [c.final for c in chunks] == [True] and chunks[0].outputs["response"] == "42."
    server.replies.extend(turns())
    log = CallLog()
    said = graph.run({"prompt": "go"}, seed=1, calls=log)
    asked = len(server.seen)
    assert agent(memory="run").run({"prompt": "go"}, seed=1, calls=CallLog(log.calls)) == said
    assert len(server.seen) == asked == 6


def test_an_answer_may_have_a_form_beside_tools(agent: Build, wire: ChatWire, server: ApiServer) -> None:
    """03 W-22: calls first, then an object under the schema; both are offered in each request."""
    form = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False}
    given = ("s", "answer", '{"sum": 42}')
    answer = wire.says(None, given) if wire.path == "/messages" else wire.says(given[2])
    for most in (1, 5):
        graph = agent(max_calls=most)
        graph.expose_input("agent", "schema", "schema")
        server.replies.extend([wire.says(None, calc("c", "6 * 7")), answer])
        assert graph.run({"prompt": "go", "schema": form})["response"] == {"sum": 42}
    assert ["calc" in wire.offered(body) for _, _, body in server.seen] == [True] * 4
    assert [wire.choice(server.seen[i][2]) for i in (1, 3)] == (["tool", "required"] if wire.path == "/messages" else ["none", "auto"])

"""The agent of a language model: valid tool calls by schema, bounded memory, budgets, one model for many agents."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import save_tiny_lm

from wg_blocks.agent_llm import LLMAgent
from wg_blocks.forecast import forecast
from wg_blocks.json_schema import problems
from wg_core import Block, ConfigError, Graph, ModelPool, Port
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.assembly.roles import LLM
from wg_core.errors import AgentStepLimitError, NodeExecutionError, OutputContractError, StateDictError
from wg_core.execution.calls import CallLog
from wg_core.execution.context import Event, derive_seed

CALC = {"tool": "calc", "arguments": {"expression": "6 * 7"}}
DONE = {"answer": "It is 42."}


def agent_graph(*says: Any, tools: Any = ("tool/calc",), llm: Any = None, pool: ModelPool | None = None, **config: Any) -> Graph:
    """The agent template with a scripted fake model, unless `llm` names another."""
    llm = llm or {"block_type": "llm/fake", "config": {"script": list(says)}}
    part = {"block_type": "agent/llm", "config": {"llm": llm, **config}}
    return Graph.from_template("agent_with_tools", agent=part, tools=tools, pool=pool)


def agent_of(graph: Graph) -> LLMAgent:
    agent = graph.nodes["agent"].child
    assert isinstance(agent, LLMAgent)
    return agent


def asked(graph: Graph, prompt: str, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    """The response, and the requests that the model was sent."""
    requests: list[dict[str, Any]] = []

    def hook(event: Event) -> None:
        if event.kind == "model_call":
            requests.append(event.data["request"])

    return graph.run({"prompt": prompt}, callbacks=[hook], **options)["response"], requests


def test_the_model_calls_a_tool_and_answers() -> None:
    """01 T-17, F-41, F-42: one call, its result, an answer; the session holds all four messages."""
    graph = agent_graph(CALC, DONE, system="You are a clerk.")
    said, requests = asked(graph, "six times seven?")
    assert said == "It is 42."
    first, second = (r["messages"] for r in requests)
    assert first[0]["role"] == "system" and first[0]["content"].startswith("You are a clerk.\n\nYou can use tools.")
    assert "- calc: Evaluates arithmetic" in first[0]["content"] and "expression (string: arithmetic" in first[0]["content"]
    assert [m["content"] for m in first[1:]] == ["six times seven?"]
    assert [m["content"] for m in second[1:]] == ["six times seven?", json.dumps(CALC), "calc (call_1) says: 42"]
    forms = requests[0]["schema"]["anyOf"]
    assert [f["required"] for f in forms] == [["tool", "arguments"], ["answer"]]
    assert forms[0]["properties"]["tool"]["const"] == "calc"
    assert [m["role"] for m in agent_of(graph).messages] == ["user", "assistant", "tool", "assistant"]
    assert graph.run({"prompt": "again", "system": "Be short."})["response"] == "It is 42."


def test_made_up_answers_are_valid_calls_too() -> None:
    """01 T-17, A-12: whatever the schema allows can be called; equal seeds give equal conversations."""
    tools = {"calc": "tool/calc", "say": "tool/echo"}

    def run(seed: int) -> list[dict[str, Any]]:
        graph = agent_graph(tools=tools, llm={"block_type": "llm/fake"}, max_calls=3)
        _, requests = asked(graph, "go on", seed=seed)
        for request, message in zip(requests, [m for m in agent_of(graph).messages if m["role"] == "assistant"], strict=True):
            assert problems(request["schema"], json.loads(message["content"])) == []
        return agent_of(graph).messages

    assert run(1) == run(1)
    assert any(len(run(seed)) > 2 for seed in range(6)), "some made-up turns call tools"


def test_a_model_without_tools_is_simply_asked() -> None:
    graph = agent_graph("A quiet night.", tools=[])
    assert asked(graph, "how is it?") == ("A quiet night.", [{
        "messages": [{"role": "user", "content": "how is it?"}], "schema": None,
        "seed": derive_seed(derive_seed(0, "agent", 0), 0),
    }])  # fmt: skip
    plain = agent_graph(llm={"block_type": "llm/identity"}, tools=[])
    assert plain.run({"prompt": "hello"})["response"] == "hello"


def test_after_its_calls_and_tokens_the_model_may_only_answer() -> None:
    """01 E-10: step and token budgets of one request."""
    graph = agent_graph(CALC, CALC, DONE, max_calls=2)
    said, requests = asked(graph, "go")
    assert said == "It is 42." and [list(r["schema"]) for r in requests[:2]] == [["anyOf"], ["anyOf"]]
    assert requests[2]["schema"]["required"] == ["answer"]
    assert asked(graph, "and again")[0] == "It is 42.", "the budget is that of one request"
    tired = agent_graph(CALC, DONE, max_tokens=5)
    assert asked(tired, "go")[1][1]["schema"]["required"] == ["answer"]
    eager = agent_graph(CALC, max_calls=50)
    with pytest.raises(AgentStepLimitError):
        eager.run({"prompt": "go"}, max_agent_steps=4)


def test_a_call_that_fails_is_told_to_the_model() -> None:
    """01 T-26: the error is part of the conversation."""
    graph = agent_graph({"tool": "calc", "arguments": {"expression": "1 / 0"}}, DONE)
    _, requests = asked(graph, "go")
    assert requests[1]["messages"][-1]["content"].startswith("calc (call_1) failed: cannot evaluate '1 / 0': division by zero")


def test_history_is_bounded_and_never_loses_the_request() -> None:
    """01 F-42, bounded: by messages, by characters; a long result is cut where it is told."""
    graph = agent_graph(CALC, DONE, history=5)
    for i in range(6):
        graph.run({"prompt": f"question {i}"})
    messages = agent_of(graph).messages
    assert len(messages) <= 6 and {"role": "user", "content": "question 5"} in messages
    assert {"role": "user", "content": "question 0"} not in messages
    long = agent_graph(
        {"tool": "echo", "arguments": {"value": "word " * 40}}, DONE, tools=["tool/echo"], result_chars=40, history_chars=300
    )
    _, requests = asked(long, "x" * 200)
    *_, told = requests[1]["messages"]
    assert told["content"].startswith("echo (call_1) says: word") and told["content"].endswith("more characters)")
    assert any(m["content"] == "x" * 200 for m in requests[1]["messages"])


def test_a_request_may_be_a_conversation_or_items() -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Well?"}]
    for given, contents in (
        (chat, ["Hi", "Hello", "Well?"]),
        (["one", "two"], ["one\ntwo"]),
        ([{"text": "rain", "source": "sky"}], ["sky: rain"]),
        ({"place": "Lys", "hour": "dusk"}, ["place: Lys\nhour: dusk"]),
    ):
        agent = LLMAgent(llm={"block_type": "llm/identity"}, build=default_registry().build)
        agent.forward({"context": given})
        assert [m["content"] for m in agent.messages[:-1]] == contents


def test_what_cannot_be_is_refused_when_built() -> None:
    """01 T-17: the model is a block with the ports of a language model; no secret, no odd setting."""
    for config, message in (
        ({"llm": {"block_type": "tool/calc"}}, "no language model"),
        ({"llm": {"block_type": "llm/fake"}, "memory": "forever"}, "memory"),
        ({"llm": {"block_type": "llm/fake"}, "history": 0}, "history"),
        ({"llm": {"block_type": "llm/fake"}, "max_tokens": "many"}, "max_tokens"),
        ({"llm": {"block_type": "llm/fake", "config": {"api_key": "x"}}}, "api_key_env"),
        ({}, "'llm' is missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            default_registry().build({"block_type": "agent/llm", "config": config})


def test_a_model_without_schema_cannot_be_given_tools() -> None:
    graph = agent_graph(llm={"block_type": "llm/identity"})
    with pytest.raises(NodeExecutionError, match="takes no schema") as caught:
        graph.run({"prompt": "hi"})
    assert isinstance(caught.value.__cause__, ConfigError)


def test_some_models_must_look_before_they_speak() -> None:
    """03 W-22, W-23: `min_calls` leaves no answer before so many calls; then the model decides."""
    graph = agent_graph(CALC, DONE, min_calls=1)
    _, requests = asked(graph, "six times seven?")
    first, second = (r["schema"] for r in requests)
    assert first["required"] == ["tool", "arguments"], "the only form is a call"
    assert [f["required"] for f in second["anyOf"]] == [["tool", "arguments"], ["answer"]]
    with pytest.raises(NodeExecutionError, match="breaks the schema"):
        agent_graph(DONE, min_calls=1).run({"prompt": "at once"})
    for wrong in (-1, 9, True):
        with pytest.raises(ConfigError, match="min_calls"):
            agent_graph(DONE, min_calls=wrong)


FORM = {"type": "object", "properties": {"mood": {"$ref": "#/$defs/word"}}, "required": ["mood"], "$defs": {"word": {"enum": ["calm"]}}}


def test_an_answer_may_have_to_be_in_a_form() -> None:
    """03 W-22: with `schema` the answer is that object, with tools and without."""
    for says, tools in (([CALC, {"answer": {"mood": "calm"}}], ["tool/calc"]), ([{"mood": "calm"}], [])):
        graph = agent_graph(*says, tools=tools)
        graph.expose_input("agent", "schema", "schema")
        assert graph.run({"prompt": "how is it?", "schema": FORM})["response"] == {"mood": "calm"}
        bad = agent_graph(*says[:-1], {"answer": {"mood": "wild"}} if tools else {"mood": "wild"}, tools=tools)
        bad.expose_input("agent", "schema", "schema")
        with pytest.raises(NodeExecutionError, match="schema"):
            bad.run({"prompt": "how is it?", "schema": FORM})


def test_the_status_says_how_it_ended_and_what_was_called() -> None:
    """01 E-10: an explicit status, and an audit trail of the calls of the request."""
    wrong = {"tool": "calc", "arguments": {"expression": "1 / 0"}}
    graph = agent_graph(wrong, CALC, DONE, DONE, max_calls=2)
    graph.expose_output("agent", "status", "status")
    status = graph.run({"prompt": "go"})["status"]
    assert (status["ended"], status["calls"]) == ("calls", 2) and status["tokens"] > 0
    assert [(c["call_id"], c["tool_id"], c["arguments"]) for c in status["trail"]] == [
        ("call_1", "calc", {"expression": "1 / 0"}), ("call_2", "calc", CALC["arguments"]),
    ]  # fmt: skip
    assert "division by zero" in status["trail"][0]["error"] and "error" not in status["trail"][1]
    assert graph.run({"prompt": "again"})["status"] == {"ended": "answer", "calls": 0, "tokens": graph.nodes["agent"].child.tokens, "trail": []}  # type: ignore[attr-defined]
    tired = agent_graph(CALC, DONE, max_tokens=5)
    tired.expose_output("agent", "status", "status")
    assert tired.run({"prompt": "go"})["status"]["ended"] == "tokens"


def test_native_calls_come_several_at_once_and_go_back_by_id() -> None:
    """01 T-17, F-41, 02 G-50: the provider's own tool calls, with the same session, limits and trail."""
    script = [{"tool_calls": [{"name": "calc", "arguments": {"expression": e}} for e in ("6 * 7", "1 / 0")]}, "It is 42."]
    llm = {"block_type": "llm/api", "config": {"provider": "fake", "model_id": "m", "options": {"script": script}}}
    graph = agent_graph(llm=llm, calling="native", max_calls=2, system="You are a clerk.")
    graph.expose_output("agent", "status", "status")
    events: list[Event] = []
    result = graph.run({"prompt": "six times seven?"}, callbacks=[events.append])
    assert result["response"] == "It is 42." and result["status"]["ended"] == "calls"
    agent = agent_of(graph)
    assert [m["role"] for m in agent.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    ids = [c["id"] for c in agent.messages[1]["tool_calls"]]
    assert [m["tool_call_id"] for m in agent.messages[2:4]] == ids == [c["call_id"] for c in result["status"]["trail"]]
    assert "42" in agent.messages[2]["content"] and "division by zero" in agent.messages[3]["content"]
    again = LLMAgent(**agent.config, build=default_registry().build)
    again.load_state_dict(agent.state_dict())
    assert again.messages == agent.messages
    with pytest.raises(ConfigError, match="native"):
        default_registry().build({"block_type": "agent/llm", "config": {"calling": "native", "llm": {"block_type": "llm/fake"}}})
    with pytest.raises(ConfigError, match="calling"):
        default_registry().build({"block_type": "agent/llm", "config": {"calling": "loud", "llm": llm}})


def test_forgotten_calls_take_their_results_along() -> None:
    agent = LLMAgent(llm={"block_type": "llm/identity"}, history=4, build=default_registry().build)
    said = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}, {"id": "b"}]}
    told = [{"role": "tool", "tool_call_id": i, "content": "x"} for i in "ab"]
    agent.messages = [said, *told, {"role": "user", "content": "new"}, {"role": "assistant", "content": "x"}]
    agent._forget()
    assert [m["role"] for m in agent.messages] == ["user", "assistant"]
    agent.messages = [{"role": "user", "content": "new"}, said, *told, *told]
    agent._forget()
    assert len(agent.messages) == 6, "what was just told stays"


class Rude(LLM):
    """A model that ignores its schema."""

    ports = (*LLM.ports, *(p for p in default_registry().build({"block_type": "llm/fake"}).input_ports if p.name == "schema"))

    def __init__(self, *, model_id: str = "rude", say: str = "whatever") -> None:
        super().__init__()
        self.say = say

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"text": self.say}


class Later(Rude):
    """A model that answers later."""

    async def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().forward(inputs)


def registry_with(**blocks: Any) -> BlockRegistry:
    registry = BlockRegistry()
    for name in ("agent/llm", "tool/calc"):
        registry.register(name, default_registry().get(name))
    for name, cls in blocks.items():
        registry.register(f"llm/{name}", cls)
    return registry


@pytest.mark.parametrize(("say", "said"), [("whatever", "no JSON"), ('{"tool": "calk", "arguments": {}}', "neither")])
def test_an_answer_outside_the_schema_is_an_error(say: str, said: str) -> None:
    graph = Graph("g")
    registry = registry_with(rude=Rude)
    graph.add_node("agent/llm", "agent", config={"llm": {"block_type": "llm/rude", "config": {"say": say}}}, registry=registry)
    graph.add_node("tool/calc", "calc", registry=registry)
    with pytest.raises(NodeExecutionError, match=said) as caught:
        graph.run({"agent:context": "hi"})
    assert isinstance(caught.value.__cause__, OutputContractError)


def test_a_model_that_answers_later_is_awaited() -> None:
    registry = registry_with(later=Later)
    graph = Graph("g")
    llm = {"block_type": "llm/later", "config": {"say": '{"answer": "at last"}'}}
    graph.add_node("agent/llm", "agent", config={"llm": llm}, registry=registry)
    graph.add_node("tool/calc", "calc", registry=registry)
    assert asyncio.run(graph.run_async({"agent:context": "hi"}))["agent:response"] == "at last"


def test_two_agents_on_one_model_share_it_and_nothing_else(tmp_path: Path) -> None:
    """01 A-11, F-38: one model object, separate sessions; each survives save and load."""
    registry = registry_with(rude=Rude)
    pool = ModelPool()
    graph = Graph("two")
    config = {"llm": {"block_type": "llm/rude", "config": {"model_id": "one", "say": "yes"}}}
    for name in ("first", "second"):
        graph.add_node("agent/llm", name, config=config, registry=registry, pool=pool)
        graph.expose_input(name, "context", name)
        graph.expose_output(name, "response", f"{name}_says")
    first, second = (graph.nodes[n].child for n in ("first", "second"))
    assert isinstance(first, LLMAgent) and isinstance(second, LLMAgent)
    assert first is not second and first.llm is second.llm and len(pool) == 1
    assert graph.validate(strict=False).is_valid, "one model is no duplicate"
    graph.run({"first": "a", "second": "b"})
    assert [m["content"] for m in first.messages] == ["a", "yes"] and [m["content"] for m in second.messages] == ["b", "yes"]
    graph.save(tmp_path / "two")
    again = Graph.load(tmp_path / "two", registry=registry)
    one, two = (again.nodes[n].child for n in ("first", "second"))
    assert (one.messages, two.messages) == (first.messages, second.messages)  # type: ignore[attr-defined]
    assert one.llm is two.llm is not first.llm  # type: ignore[attr-defined]
    again.run({"first": "more", "second": "more"})
    assert [m["content"] for m in one.messages] == ["a", "yes", "more", "yes"]  # type: ignore[attr-defined]
    assert again.to_config() == graph.to_config()


def test_a_session_that_is_none_is_refused() -> None:
    agent = LLMAgent(llm={"block_type": "llm/fake"}, build=default_registry().build)
    for key, value in (("session.messages", [{"role": "king", "content": ""}]), ("session.number", -1), ("session.calls", True), ("session.trail", [7])):
        with pytest.raises(StateDictError, match="session"):
            agent.load_state_dict({**agent.state_dict(), key: value})
    assert agent.messages == []


def test_a_model_inside_a_tool_comes_from_the_pool_of_the_agent() -> None:
    """01 F-46, A-11: a graph as a tool is built through the same registry and pool."""
    registry = registry_with(rude=Rude)
    registry.register("graph/ref", default_registry().get("graph/ref"))
    pool = ModelPool()
    llm = {"block_type": "llm/rude", "config": {"model_id": "one", "say": '{"answer": "ok"}'}}
    inner = {"id": "inner", "nodes": [{"node_id": "llm", **llm}]}
    graph = Graph("g")
    graph.add_node("agent/llm", "agent", config={"llm": llm}, registry=registry, pool=pool)
    graph.add_node("graph/ref", "ask", config={"graph": inner}, registry=registry, pool=pool)
    graph.add_tool("ask", "ask", result_port="text")
    assert len(pool) == 1 and graph.validate().is_valid
    assert graph.run({"agent:context": "hi"})["agent:response"] == "ok"


def test_a_small_local_model_makes_valid_calls(tmp_path: Path) -> None:
    """01 T-17: a network with random weights, decoded under the schema, calls tools and answers."""
    folder = save_tiny_lm(tmp_path / "tiny")
    llm = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(folder)}}
    graph = agent_graph(
        tools={"calc": "tool/calc"}, llm=llm, pool=ModelPool(), max_calls=2, answer_chars=20,
        params={"max_new_tokens": 160, "temperature": 1.0},
    )  # fmt: skip
    graph.remove_tool("calc")
    short = {"type": "object", "properties": {"expression": {"type": "string", "maxLength": 8}}, "required": ["expression"]}
    graph.add_tool("calc", "calc", parameters={**short, "additionalProperties": False})
    said = [graph.run({"prompt": "one and one"}, seed=seed)["response"] for seed in range(2)]
    assert all(isinstance(text, str) for text in said)
    for message in agent_of(graph).messages:
        if message["role"] == "assistant":
            assert set(json.loads(message["content"])) in ({"answer"}, {"tool", "arguments"})


def test_a_recorded_conversation_is_replayed_without_the_model() -> None:
    """02 G-49 with replay: what leaves the record ends the run, also inside a tool; it is no tool error."""
    inner = {
        "id": "ask", "nodes": [{"node_id": "llm", "block_type": "llm/fake"}],
        "exposed_inputs": [{"name": "prompt", "node_id": "llm", "port_name": "prompt"}],
        "exposed_outputs": [{"name": "text", "node_id": "llm", "port_name": "text"}],
    }  # fmt: skip
    tools = {"ask": {"block_type": "graph/ref", "config": {"graph": inner}}}

    def graph(word: str = "tides") -> Graph:
        return agent_graph({"tool": "ask", "arguments": {"prompt": word}}, {"answer": "Enough."}, tools=tools, memory="run")

    log = CallLog()
    recorded = graph()
    assert recorded.run({"prompt": "go"}, seed=1, calls=log) == {"response": "Enough."}
    assert [call["place"] for call in log.calls] == ["agent", "ask/llm", "agent"]
    again = graph()
    replay = CallLog(log.calls)
    assert again.run({"prompt": "go"}, seed=1, calls=replay) == {"response": "Enough."} and replay.unused == 0
    assert agent_of(again).messages == agent_of(recorded).messages
    without = [call for call in log.calls if call["place"] != "ask/llm"]
    with pytest.raises(NodeExecutionError, match="ask/llm"):
        graph().run({"prompt": "go"}, seed=1, calls=CallLog(without))
    usage: dict[str, Any] = {}
    graph().run({"prompt": "go"}, callbacks=[lambda event: usage.update({event.kind: event})])
    assert usage["model_call"].path == "agent_with_tools/agent"


def test_the_forecast_counts_an_agents_calls() -> None:
    """One call at least, one more for each tool call at most, bounded by the steps of the graph."""
    (row,) = forecast(agent_graph(DONE, system="You are a clerk."))
    assert (row["path"], row["calls"], row["calls_at_most"]) == ("agent", 1, 7 * 3)
    assert row["prompt_tokens"] > 20 and row["context_tokens"] == 2000
    assert next(forecast(agent_graph(DONE, tools=[])))["calls_at_most"] == 1


def test_the_plan_tells_the_tools_of_an_agent() -> None:
    """02 G-42."""
    graph = agent_graph(DONE)
    assert graph.describe().splitlines()[1:] == ["  agent: agent/llm", "    may call calc: tool/calc"]
    assert graph.plan_data()["steps"][0]["tools"] == {"calc": {"node": "calc", "kind": "tool/calc"}}


def test_an_agent_may_be_driven_by_a_model_behind_an_api() -> None:
    """01 T-23, T-17: the offline provider; the same block, another model."""
    llm = {"block_type": "llm/api", "config": {"provider": "fake", "model_id": "m"}}
    graph = agent_graph(tools=["tool/calc"], llm=llm, max_calls=2, pool=ModelPool())
    assert isinstance(graph.run({"prompt": "hi"}, seed=3)["response"], str)


class Odd(Block):
    """Gives what is no JSON, or no UTF-8."""

    ports = (Port("kind", "in", "text"), Port("result", "out", "any"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ring: list[Any] = []
        ring.append(ring)
        if inputs["kind"] == "error":
            raise ValueError("half a \ud800 letter")
        return {"result": {"ring": ring, "keys": {(1, 2): 3}, "half": "a \ud800 letter"}[inputs["kind"]]}


@pytest.mark.parametrize(
    ("kind", "told"),
    [("ring", "says: list"), ("keys", "says: dict"), ("half", "says: a \ufffd letter"), ("error", "failed: ValueError: half a \ufffd letter")],
)
def test_a_result_of_any_kind_is_told_and_can_be_saved(kind: str, told: str, tmp_path: Path) -> None:
    """01 F-41, F-42, 02 G-49."""
    graph = agent_graph({"tool": "odd", "arguments": {"kind": kind}}, DONE, tools=())
    graph.add_node(Odd(), "odd")
    graph.add_tool("odd", "odd")
    assert asked(graph, "look \ud800")[0] == "It is 42."
    request, _, result, _ = agent_of(graph).messages
    assert request["content"] == "look \ufffd" and told in result["content"]
    json.dumps(agent_of(graph).own_state_dict(), ensure_ascii=False).encode()

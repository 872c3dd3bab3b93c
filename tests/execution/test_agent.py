"""The agent loop of the engine: turns, tools, results, limits, errors; by scripted agents whose every word is known."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from blocks_for_tests import new_registry

from wg_blocks.agent_scripted import ScriptedAgent
from wg_core import Block, ConfigError, Graph, Pipeline, Port, ValidationError, current_context
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.assembly.roles import Agent
from wg_core.errors import (
    AbortRun,
    AgentStepLimitError,
    MissingInputError,
    NodeExecutionError,
    OutputContractError,
    PortValueError,
    RunTimeoutError,
    ToolError,
)
from wg_core.execution.agent import AGENT_STEPS, ToolSpec, is_agentic
from wg_core.execution.context import Event


def call(tool_id: str, call_id: str | None = None, **arguments: Any) -> dict[str, Any]:
    return {"tool_id": tool_id, "arguments": arguments, **({"call_id": call_id} if call_id else {})}


def calls(*wanted: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": list(wanted)}


class Scale(Block):
    """Multiplies a number by a factor that the graph gives."""

    ports = (
        Port("x", "in", "number", description="what to scale"),
        Port("by", "in", "number"),
        Port("plus", "in", "number", default=0),
        Port("y", "out", "number"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(dict(inputs))
        return {"y": inputs["x"] * inputs["by"] + inputs["plus"]}


class Probe(Block):
    """Tells where and with which seed it runs; counts usage."""

    ports = (Port("word", "in", "text", optional=True), Port("said", "out", "dict"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        context = current_context()
        context.add_usage("probe", prompt_tokens=2)
        said = {"path": context.path, "seed": context.node_seed(), "world": context.extra.get("step"), "at": context.iteration}
        return {"said": said}


class Slow(Block):
    """Takes its time; looks up now and then, as long work does."""

    ports = (Port("seconds", "in", "number"), Port("looks", "in", "number", default=1), Port("done", "out", "text"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        for _ in range(int(inputs["looks"])):
            time.sleep(inputs["seconds"] / inputs["looks"])
            current_context().emit("progress")
        return {"done": "slept"}


class Snap(Block):
    """Gives a picture, or fails."""

    ports = (Port("fail", "in", "text", default=""), Port("picture", "out", "image"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        if inputs["fail"]:
            raise ZeroDivisionError(inputs["fail"])
        return {"picture": np.full((1, 3, 2, 2), 0.5)}


class Look(Block):
    """Says how bright a picture is."""

    ports = (Port("picture", "in", "image"), Port("mean", "out", "number"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"mean": float(inputs["picture"].mean())}


class Listener(Agent):
    """Follows a plan of turns and keeps all that it was given."""

    ports = Agent.ports

    def __init__(self, turns: list[Any], tools: list[str] | None = None) -> None:
        super().__init__()
        self.turns = turns
        self.tools = tools
        self.given: list[dict[str, Any]] = []

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        turn = self.turns[len(self.given) % len(self.turns)]
        self.given.append(dict(inputs))
        if turn == "tell":
            return {"response": {"results": inputs["tool_results"]}}
        return dict(turn)


def graph_with(agent: Block, tools: Mapping[str, Block], **more: Any) -> Graph:
    """`prompt` in, `response` out, the blocks as tools under their names."""
    graph = Graph("g", **more)
    graph.add_node(agent, "bot")
    for name, block in tools.items():
        graph.add_node(block, name)
        graph.add_tool(name, name)
    graph.expose_input("bot", "context", "prompt")
    graph.expose_output("bot", "response", "response")
    return graph


def scripted(*script: Any, **more: Any) -> ScriptedAgent:
    return ScriptedAgent(script=list(script), **more)


def calc_graph(*script: Any) -> Graph:
    template = {"block_type": "agent/scripted", "config": {"script": list(script)}}
    return Graph.from_template("agent_with_tools", agent=template)


# ---- turns, calls, results ---------------------------------------------------------------------------------------------


def test_an_agent_calls_a_tool_and_answers_with_its_result() -> None:
    """02 G-48: forward, tools, results, until there are no calls; the answer is the agent's output."""
    graph = calc_graph(calls(call("calc", expression="6 * 7")), "it is {results}")
    assert graph.run({"prompt": "six times seven?"}) == {"response": "it is 42"}
    assert graph.plan().order() == ["agent"], "tools are in no plan"


def test_calls_of_one_turn_run_in_listed_order_and_keep_their_ids() -> None:
    """02 G-50, 01 F-41; ids are given where the agent gave none."""
    turn = calls(call("calc", "b", expression="1"), call("echo", "a", value=["x"]), call("calc", expression="2 + 1"))
    graph = graph_with(agent := Listener([turn, "tell"]), {})
    registry = default_registry()
    for name in ("calc", "echo"):
        graph.add_node(registry.build({"block_type": f"tool/{name}"}), name)
    order: list[tuple[str, str]] = []

    def hook(event: Event) -> None:
        if event.kind.startswith("tool"):
            order.append((event.kind, event.path))

    results = graph.run({"prompt": "go"}, callbacks=[hook])["response"]["results"]
    assert results == [
        {"call_id": "b", "tool_id": "calc", "result": 1},
        {"call_id": "a", "tool_id": "echo", "result": ["x"]},
        {"call_id": "call_0_2", "tool_id": "calc", "result": 3},
    ]
    paths = ["g/calc", "g/echo", "g/calc"]
    assert order == [(kind, path) for path in paths for kind in ("tool_start", "tool_end")]
    assert agent.given[1]["context"] == "go", "F-42: the inputs that began it come again with the results"


def test_events_name_tool_call_and_agent() -> None:
    """02 G-46: tool_start and tool_end."""
    events: list[Event] = []
    graph = calc_graph(calls(call("calc", "c1", expression="2"), call("calc", "c2", expression="?")), "ok")
    graph.run({"prompt": "go"}, callbacks=[events.append])
    said = {"tool_id": "calc", "call_id": "c1", "agent": "agent"}
    first, end, _, failed = (e for e in events if e.kind.startswith("tool_"))
    assert (first.data, first.inputs, first.node_id) == (said, {"expression": "2"}, "calc")
    assert (end.data, end.outputs) == (said, {"result": 2}) and end.elapsed is not None
    assert "cannot evaluate '?'" in failed.data["error"]
    assert [e.kind for e in events if e.path == "agent_with_tools/agent"] == ["node_start", "node_end"]


def test_an_agent_learns_its_tools_before_the_first_step() -> None:
    """01 F-43, T-26, A-12: ids, descriptions, and schemas that follow from the ports."""
    registry = default_registry()
    agent = Listener([{"response": "hi"}])
    graph = graph_with(agent, {"scale": Scale(), "look": Look()})
    graph.set_default("scale", "by", 3)
    graph.add_node(registry.build({"block_type": "tool/calc"}), "sum")
    assert graph.run({"prompt": ""}) == {"response": "hi"}
    scale, look, add = agent.bound
    assert all(isinstance(tool, ToolSpec) for tool in agent.bound)
    assert (scale.id, scale.description) == ("scale", "Multiplies a number by a factor that the graph gives.")
    assert scale.parameters == {
        "type": "object",
        "properties": {
            "x": {"type": "number", "description": "what to scale"},
            "by": {"type": "number"},
            "plus": {"type": "number", "default": 0},
        },
        "required": ["x"],
        "additionalProperties": False,
    }
    assert look.parameters["properties"]["picture"]["type"] == "string", "media are named by reference"
    assert add.parameters["required"] == ["expression"]


def test_the_types_of_ports_become_types_of_json() -> None:
    """01 T-26: text, number, dict, list, media; what may be anything is free, what cannot be JSON is left out."""

    class Odd(Block):
        ports = (
            Port("a", "in", "text|number"), Port("b", "in", "dict"), Port("c", "in", "list"), Port("d", "in", "audio|ref"),
            Port("e", "in", "any"), Port("f", "in", "tensor", optional=True), Port("g", "in", "text", schema={"enum": ["x"]}),
            Port("y", "out", "any"),
        )  # fmt: skip

    agent = Listener([{"response": ""}])
    graph_with(agent, {"odd": Odd()}).run({"prompt": ""})
    properties = agent.bound[0].parameters["properties"]
    assert {n: s.get("type") for n, s in properties.items()} == {
        "a": ["string", "number"], "b": "object", "c": "array", "d": "string", "e": None, "g": "string",
    }  # fmt: skip
    assert properties["g"]["enum"] == ["x"] and "f" not in properties


def test_the_whitelist_of_an_agent_is_all_that_it_may_call() -> None:
    """01 T-26, E-10: a tool that is not on the list is unknown to this agent."""
    agent = Listener([calls(call("scale", x=1)), "tell"], tools=["look"])
    graph = graph_with(agent, {"scale": Scale(), "look": Look()})
    (result,) = graph.run({"prompt": ""})["response"]["results"]
    assert "no tool 'scale'" in result["error"] and "'look'" in result["error"]
    assert [tool.id for tool in agent.bound] == ["look"]


# ---- what a tool is given ------------------------------------------------------------------------------------------------


def test_edges_into_a_tool_are_constants_that_no_call_may_set() -> None:
    """02 G-49: static edges feed tools; they are made before the agent, wherever its node stands."""
    scale = Scale()
    agent = Listener([calls(call("scale", x=5), call("scale", x=2, plus=1), call("scale", x=1, by=100)), "tell"])
    graph = graph_with(agent, {"scale": scale})
    registry = new_registry()
    graph.add_node(registry.build({"block_type": "test/affine", "config": {"scale": 1, "offset": 3}}), "three")
    graph.add_edge("three", "y", "scale", "by")
    graph.expose_input("three", "x", "start")
    results = graph.run({"prompt": "", "start": 7})["response"]["results"]
    assert [r.get("result") for r in results] == [50, 21, None]
    assert "by" in results[2]["error"] and "x, plus" in results[2]["error"]
    assert graph.plan().order() == ["three", "bot"]
    assert "by" not in agent.bound[0].parameters["properties"]
    assert not graph.validate().warnings, "what feeds a tool leads somewhere"


def test_an_exposed_input_of_a_tool_is_given_by_the_caller() -> None:
    """02 G-49; what is required of the tool is required of the graph."""
    graph = graph_with(Listener([calls(call("scale", x=5)), "tell"]), {"scale": Scale()})
    graph.expose_input("scale", "by", "factor")
    assert graph.resting() == {"scale"}
    assert graph.run({"prompt": "", "factor": 4})["response"]["results"][0]["result"] == 20
    with pytest.raises(MissingInputError, match="factor"):
        graph.run({"prompt": ""})


def test_a_tool_that_needs_what_no_argument_can_be_needs_it_from_the_graph() -> None:
    """01 T-26: a required tensor is refused, unless the graph feeds it; a view of the world is asked for in validation."""

    class Find(Block):
        ports = (Port("world", "in", "world"), Port("q", "in", "text"), Port("y", "out", "text"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"y": inputs["world"].items(inputs["q"])}

    class World:
        def items(self, q: str) -> str:
            return f"about {q}"

    graph = graph_with(Listener([calls(call("find", q="sea")), "tell"]), {"find": Find()})
    with pytest.raises(ValidationError, match=r"'world' needs a world.*AGENT_TOOLS"):
        graph.validate()
    graph.expose_input("find", "world", "world")
    assert graph.run({"prompt": "", "world": World()})["response"]["results"][0]["result"] == "about sea"


def test_pictures_go_from_tool_to_tool_by_reference() -> None:
    """01 T-26: an argument for a medium names the call that made it."""
    script = [calls(call("snap", "pic")), calls(call("look", picture="pic"), call("look", picture="nope")), "tell"]
    graph = graph_with(Listener(script), {"snap": Snap(), "look": Look()})
    seen, lost = graph.run({"prompt": ""})["response"]["results"]
    assert seen["result"] == 0.5
    assert "names no result" in lost["error"] and "pic" in lost["error"]


# ---- what goes wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (call("scales", x=1), "no tool 'scales'; tools: 'scale', 'snap'"),
        (call("scale", x="five", by=1), "bad arguments for 'scale': x: 'five' is not of type 'number'; it takes x, by, plus"),
        (call("scale", by=1), "'x' is a required property"),
        (call("scale", x=1, by=1, z=1), "'z' was unexpected"),
        ({"tool_id": "scale", "arguments": [1]}, "are an object, not list"),
        (call("snap", fail="broken lens"), "ZeroDivisionError: broken lens"),
    ],
)
def test_a_call_that_fails_is_a_result_that_says_so(wanted: dict[str, Any], said: str) -> None:
    """02 G-49, 01 F-41, A-12: unknown tool, bad arguments, an exception; the agent reads it and goes on."""
    agent = Listener([calls(wanted, call("scale", "good", x=2, by=2)), "tell"])
    graph = graph_with(agent, {"scale": Scale(), "snap": Snap()})
    failed, good = graph.run({"prompt": ""})["response"]["results"]
    assert said in failed["error"] and "result" not in failed
    assert good == {"call_id": "good", "tool_id": "scale", "result": 4}
    with pytest.raises(NodeExecutionError, match=r"g/(scale|snap|bot), called as tool"):
        graph.run({"prompt": ""}, tool_errors="raise")
    agent.given.clear()
    graph.metadata["tool_errors"] = "raise"
    with pytest.raises(NodeExecutionError, match="called as tool"):
        graph.run({"prompt": ""})
    with pytest.raises(ConfigError, match="tool_errors"):
        graph.run({"prompt": ""}, tool_errors="ignore")


@pytest.mark.parametrize("wrong", ["calc", [{"arguments": {}}], ["calc"], [call("a", "x"), call("b", "x")], [{"tool_id": 7}]])
def test_calls_of_a_wrong_form_are_the_agents_own_fault(wrong: Any) -> None:
    """01 F-41: a list of calls with ids that differ."""
    graph = graph_with(Listener([{"tool_calls": wrong}]), {"scale": Scale()})
    with pytest.raises(NodeExecutionError, match="tool_calls is a list of") as caught:
        graph.run({"prompt": ""})
    assert isinstance(caught.value.__cause__, OutputContractError)


def test_the_limit_of_steps_is_an_error_that_says_so() -> None:
    """02 G-49: never a silent return; from the run, else the graph, else ten."""
    agent = Listener([calls(call("scale", x=1, by=1))])
    graph = graph_with(agent, {"scale": Scale()})
    for options, steps in (({"max_agent_steps": 3}, 3), ({}, AGENT_STEPS), ({"per_node": {}}, AGENT_STEPS)):
        agent.given.clear()
        with pytest.raises(AgentStepLimitError, match=rf"g/bot gave no answer in {steps} steps and wanted 'scale'"):
            graph.run({"prompt": ""}, **options)
        assert len(agent.given) == steps
    graph.metadata["max_agent_steps"] = 2
    with pytest.raises(NodeExecutionError, match="in 2 steps"):
        graph.run({"prompt": ""})
    with pytest.raises(NodeExecutionError, match="max_agent_steps is a whole number") as caught:
        graph.run({"prompt": ""}, max_agent_steps=0)
    assert isinstance(caught.value.__cause__, PortValueError)


def test_a_limit_that_is_just_enough_is_enough() -> None:
    graph = calc_graph(calls(call("calc", expression="1")), "ok")
    assert graph.run({"prompt": ""}, max_agent_steps=2) == {"response": "ok"}


def test_what_an_agent_raises_is_told_with_its_place() -> None:
    class Broken(Listener):
        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            raise KeyError("lost")

    with pytest.raises(NodeExecutionError, match="g/bot failed: KeyError"):
        graph_with(Broken([]), {"scale": Scale()}).run({"prompt": ""})


def test_cancelling_and_the_timeout_of_the_run_end_it_between_calls() -> None:
    """02 G-49 with G-27: no error result, the run stops."""
    stop = threading.Event()

    def hook(event: Event) -> None:
        if event.kind == "tool_end":
            stop.set()

    agent = Listener([calls(call("slow", seconds=0.001), call("slow", seconds=0.001))])
    graph = graph_with(agent, {"slow": Slow()})
    with pytest.raises(AbortRun):
        graph.run({"prompt": ""}, cancel=stop, callbacks=[hook])
    assert len(agent.given) == 1
    with pytest.raises(RunTimeoutError):
        graph_with(Listener([calls(call("slow", seconds=0.05, looks=5))]), {"slow": Slow()}).run({"prompt": ""}, timeout=0.02)


def test_a_tool_has_a_timeout_of_its_own() -> None:
    """01 E-10: a tool that takes too long is an error result; the run goes on."""
    agent = Listener([calls(call("slow", seconds=60, looks=600), call("slow", seconds=0.4), call("slow", seconds=0.0)), "tell"])
    graph = graph_with(agent, {})
    graph.add_node(Slow(), "slow")
    graph.add_tool("slow", "slow", timeout=0.3)
    began = time.monotonic()
    first, second, third = graph.run({"prompt": ""}, timeout=90)["response"]["results"]
    assert "longer than its timeout of 0.3 s" in first["error"] and "longer" in second["error"]
    assert third["result"] == "slept" and time.monotonic() - began < 30
    for wrong in (0, -1, True):
        with pytest.raises(ToolError, match="timeout"):
            graph.add_tool("again", "slow", timeout=wrong)


# ---- seeds, usage, capture, other drivers ------------------------------------------------------------------------------------


def test_tools_run_in_the_frame_of_the_graph() -> None:
    """02 G-44: paths, seeds (one for each call, equal in equal runs), usage and captures."""
    graph = graph_with(Listener([calls(call("probe", word="a"), call("probe", word="a")), "tell"]), {"probe": Probe()})
    outer = Pipeline("p")
    outer.add_graph(graph, "inner")
    first, second, other = (outer.run({"prompt": ""}, seed=s, extra={"step": 4}) for s in (1, 1, 2))
    one, two = (r["result"] for r in first["response"]["results"])
    assert one["path"] == two["path"] == "p/inner/probe" and one["world"] == 4
    assert one["seed"] != two["seed"], "two calls of one tool draw differently"
    assert first == second != other
    run = graph.run({"prompt": ""}, seed=1, capture=["probe:said"])
    assert run["probe:said"]["path"] == "g/probe"


def test_a_dry_run_calls_nobody() -> None:
    """02 G-41: the same order and result keys; nothing is called."""
    agent, scale = Listener([calls(call("scale", x=1))]), Scale()
    graph = graph_with(agent, {"scale": scale})
    graph.expose_input("scale", "by", "by")
    assert set(graph.dry_run()) == {"response"} and (agent.given, scale.seen, agent.bound) == ([], [], ())


def test_the_pause_before_each_node_is_before_each_turn_and_tool() -> None:
    graph = calc_graph(calls(call("calc", expression="1"), call("calc", expression="2")), "so {results}")
    steps = graph.steps({"prompt": ""})
    path = [step.path.partition("/")[2] for step in steps]
    assert path == ["agent", "calc", "calc", "agent"] and steps.result == {"response": "so 1, 2"}
    assert [c.outputs for c in graph.stream({"prompt": ""})] == [{"response": "so 1, 2"}]


class LaterAgent(Listener):
    async def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().forward(inputs)


class LaterTool(Block):
    """Waits, or fails, in an event loop."""

    ports = (Port("seconds", "in", "number"), Port("y", "out", "text"))

    async def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        if inputs["seconds"] < 0:
            raise ValueError("back in time")
        await asyncio.sleep(inputs["seconds"])
        return {"y": current_context().path}


def test_agents_and_tools_may_be_asynchronous() -> None:
    turn = calls(call("wait", seconds=0), call("wait", seconds=-1), call("wait", seconds=5))
    graph = graph_with(LaterAgent([turn, "tell"]), {})
    graph.add_node(LaterTool(), "wait")
    graph.add_tool("wait", "wait", timeout=0.05)
    good, failed, late = asyncio.run(graph.run_async({"prompt": ""}))["response"]["results"]
    assert good["result"] == "g/wait" and "back in time" in failed["error"] and "longer" in late["error"]
    with pytest.raises(NodeExecutionError, match="run_async"):
        graph.run({"prompt": ""})
    stop = graph_with(LaterAgent([calls(call("wait", seconds=5))]), {"wait": LaterTool()})
    with pytest.raises(RunTimeoutError):
        asyncio.run(stop.run_async({"prompt": ""}, timeout=0.05))


class Meet(Block):
    """Waits until as many others are here at the same time."""

    ports = (Port("word", "in", "text"), Port("said", "out", "text"))
    barrier = threading.Barrier(2, timeout=20)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.barrier.wait()
        context = current_context()
        context.add_usage("talk", prompt_tokens=1)
        context.emit("progress", word=inputs["word"])
        if inputs["word"] == "oops":
            raise ValueError("dropped it")
        return {"said": f"{context.node_id} {inputs['word']} {context.node_seed()}"}


def test_calls_of_one_turn_may_run_side_by_side() -> None:
    """02 G-50: results, ids, seeds and usage as in order; two that wait for each other meet only when run together."""
    turn = calls(call("left", "l", word="a"), call("right", "r", word="oops"), call("nobody"), call("scale", x=2, by=3))
    graph = graph_with(agent := Listener([turn, "tell"]), {"left": Meet(), "right": Meet(), "scale": Scale()})
    graph.metadata["parallel_tools"] = 3
    events: list[Event] = []
    results = graph.run({"prompt": ""}, seed=1, callbacks=[events.append])["response"]["results"]
    assert [r["call_id"] for r in results] == ["l", "r", "call_0_2", "call_0_3"]
    assert results[0]["result"].startswith("left a ") and "dropped it" in results[1]["error"]
    assert "no tool 'nobody'" in results[2]["error"] and results[3]["result"] == 6
    assert sorted(e.path for e in events if e.kind == "progress") == ["g/left", "g/right"]
    ends = [(e.node_id, e.data["call_id"]) for e in events if e.kind == "tool_end"]
    assert ends == [("left", "l"), ("right", "r"), ("bot", "call_0_2"), ("scale", "call_0_3")]
    agent.given.clear()
    assert graph.run({"prompt": ""}, seed=1)["response"]["results"] == results, "equal seeds, equal results"
    agent.given.clear()
    with pytest.raises(NodeExecutionError, match="called as tool 'right'"):
        graph.run({"prompt": ""}, tool_errors="raise")
    graph.metadata["parallel_tools"] = 0
    with pytest.raises(NodeExecutionError, match="parallel_tools is a whole number"):
        graph.run({"prompt": ""})


def test_side_by_side_tools_keep_their_timeouts_and_may_be_asynchronous() -> None:
    """01 E-10 with 02 G-50: each call its own time; one tool's calls stay in their order."""
    turn = calls(call("wait", seconds=0.1), call("other", seconds=0.1), call("wait", seconds=60), call("slow", seconds=60, looks=600))
    graph = graph_with(Listener([turn, "tell"]), {})
    for name, block in (("wait", LaterTool()), ("other", LaterTool()), ("slow", Slow())):
        graph.add_node(block, name)
        graph.add_tool(name, name, timeout=2 if name != "slow" else 0.3)
    graph.metadata["parallel_tools"] = 4
    first, second, late, slow = asyncio.run(graph.run_async({"prompt": ""}))["response"]["results"]
    assert (first["result"], second["result"]) == ("g/wait", "g/other")
    assert "longer than its timeout of 2 s" in late["error"] and "longer than its timeout of 0.3 s" in slow["error"]


def test_an_agent_has_a_time_of_its_own() -> None:
    """02 G-49: the limit in seconds ends a run as the one in steps does, with an error that says so."""
    graph = graph_with(Listener([calls(call("slow", seconds=0.02))]), {"slow": Slow()})
    graph.metadata["max_agent_seconds"] = 0.05
    with pytest.raises(AgentStepLimitError, match=r"g/bot gave no answer in 0.05 s and wanted 'slow'"):
        graph.run({"prompt": ""}, max_agent_steps=100)


def test_a_tool_may_narrow_what_the_agent_is_told() -> None:
    """03 W-22: names restricted to what there is, by what the graph feeds the tool."""

    class Pick(Block):
        ports = (Port("names", "in", "list"), Port("name", "in", "text"), Port("y", "out", "text"))

        def narrowed(self, parameters: Mapping[str, Any], fed: Mapping[str, Any]) -> Mapping[str, Any]:
            name = {**parameters["properties"]["name"], "enum": fed["names"]}
            return {**parameters, "properties": {"name": name}}

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"y": inputs["name"]}

    graph = graph_with(agent := Listener([{"response": ""}]), {"pick": Pick()})
    graph.expose_input("pick", "names", "names")
    for names in (["ada"], ["bo", "cy"]):
        graph.run({"prompt": "", "names": names})
        assert agent.bound[0].parameters["properties"]["name"]["enum"] == names
    assert "enum" not in graph.agents()["bot"][0].spec.parameters["properties"]["name"]


def test_an_agent_in_a_loop_runs_its_tools_in_every_iteration() -> None:
    """02 G-48 with G-33: constants of a tool may be made in the same iteration."""

    class Count(Block):
        ports = (Port("n", "in", "number"), Port("next", "out", "number"), Port("text", "out", "text"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"next": inputs["n"] + 1, "text": f"by {inputs['n'] + 1}"}

    class Last(Block):
        ports = (Port("said", "in", "dict"), Port("n", "out", "number"))

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"n": inputs["said"]["results"][0]["result"]}

    agent = Listener([calls(call("scale", x=10)), "tell"])
    graph = graph_with(agent, {"scale": Scale()})
    graph.unexpose_input("prompt")
    graph.unexpose_output("response")
    graph.add_node(Last(), "last")
    graph.add_node(Count(), "count")
    graph.add_edge("bot", "response", "last", "said")
    graph.add_edge("last", "n", "count", "n", carry=True)
    graph.set_default("count", "n", 1)
    graph.add_edge("count", "next", "scale", "by")
    graph.add_edge("count", "text", "bot", "context")
    graph.expose_output("last", "n", "n")
    assert graph.plan().loops[0].nodes == ("count", "bot", "last")
    assert graph.run({}, num_loop_steps=2) == {"n": 10 * (10 * (1 + 1) + 1)}
    assert [g["context"] for g in agent.given] == ["by 2", "by 2", "by 21", "by 21"]


# ---- tools of other shapes -----------------------------------------------------------------------------------------------------

INNER = {
    "id": "inner", "nodes": [{"node_id": "calc", "block_type": "tool/calc"}],
    "exposed_inputs": [{"name": "expression", "node_id": "calc", "port_name": "expression"}],
    "exposed_outputs": [{"name": "value", "node_id": "calc", "port_name": "result"}],
}  # fmt: skip
PIPE = {
    "id": "pipe", "nodes": [{"node_id": "inner", "config": INNER}],
    "exposed_inputs": [{"name": "expression", "node_id": "inner", "port_name": "expression"}],
    "exposed_outputs": [{"name": "value", "node_id": "inner", "port_name": "value"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("block_type", "config"), [("graph/ref", {"graph": INNER}), ("pipeline/ref", {"pipeline": PIPE})]
)
def test_a_tool_may_be_a_graph_or_a_pipeline(block_type: str, config: dict[str, Any]) -> None:
    """01 T-26, 02 G-48; what fails inside is told with its path."""
    part = {"block_type": block_type, "config": config}
    agent = {"block_type": "agent/scripted", "config": {"script": [
        calls(call("sub", expression="3 * 3"), call("sub", expression="?")), "{results}",
    ]}}  # fmt: skip
    graph = Graph.from_template("agent_with_tools", agent=agent, tools={"sub": part})
    said = graph.run({"prompt": ""})["response"]
    assert said.startswith("9, ") and "/calc failed: ToolError" in said
    assert graph.agents()["agent"][0].spec.parameters["properties"]["expression"]["description"].startswith("arithmetic")
    again = Graph.from_config(graph.to_config())
    assert again.run({"prompt": ""}) == {"response": said}


def test_an_agent_graph_is_a_node_of_a_pipeline_and_a_tool_of_another_agent() -> None:
    """02 P-9: prompt in, final answer out; agents call agents as graphs of their own."""
    inner = calc_graph(calls(call("calc", expression="20 + 1")), "{results}").to_config()
    boss = {"block_type": "agent/scripted", "config": {"script": [calls(call("clerk", prompt="add")), "the clerk says {results}"]}}
    graph = Graph.from_template(
        "agent_with_tools", agent=boss, tools={"clerk": {"block_type": "graph/ref", "config": {"graph": inner}}}
    )
    pipeline = Pipeline("p")
    pipeline.add_graph(graph, "office")
    pipeline.expose_input("office", "prompt", "prompt")
    pipeline.expose_output("office", "response", "response")
    assert pipeline.run({"prompt": "go"}) == {"response": "the clerk says 21"}
    again = Pipeline.from_config(pipeline.to_config())
    assert again.run({"prompt": "go"}) == {"response": "the clerk says 21"}


# ---- validation and configuration ------------------------------------------------------------------------------------------------


def test_an_agent_is_marked_so_and_has_the_two_ports() -> None:
    """01 F-40."""

    class Half(Block):
        agentic = True
        ports = (Port("x", "in", "any", optional=True), Port("tool_calls", "out", "list", optional=True))

    registry = BlockRegistry()
    registry.register("agent/half", Half)
    registry.register("agent/full", Listener)
    assert is_agentic(Listener([])) and not is_agentic(Half()) and not is_agentic(Scale())
    assert registry.is_agentic("agent/full") and not registry.is_agentic("agent/half")
    assert default_registry().is_agentic("agent/llm") and not default_registry().is_agentic("tool/calc")


@pytest.mark.parametrize(
    ("tools", "allowed", "said"),
    [
        ({"gone": {"node": "nowhere"}}, None, "'nowhere', which does not exist"),
        ({"calc": {"node": "calc"}}, ["calk"], "may call 'calk', which is no tool; did you mean 'calc'?"),
        ({"calc": {"node": "calc"}}, ["calc", "calc"], "lists a tool twice"),
        ({"calc": {"node": "calc", "result_port": "y"}}, None, "no output 'y'"),
        ({"calc": {"node": "calc", "parameters": {"type": "object"}}}, None, "additionalProperties: false"),
        ({"calc": {"node": "calc", "parameters": {"type": "objekt"}}}, None, "no JSON schema"),
        ({"calc": {"node": "calc", "parameters": {"properties": {"y": {}}}}}, None, "'y', which is no input"),
        ({"calc": {"node": "calc", "parameters": {"properties": {"expression": {"$ref": "#/x"}}}}}, None, "without $ref"),
        ({"bot": {"node": "bot"}}, None, "it is an agent"),
    ],
)
def test_broken_tool_tables_are_errors_that_show_the_way_out(tools: Any, allowed: list[str] | None, said: str) -> None:
    """02 G-26 AGENT_TOOLS, also when the graph comes from a file."""
    agent = {"script": ["hi"], **({"tools": allowed} if allowed else {})}
    config: dict[str, Any] = {
        "id": "g",
        "nodes": [
            {"node_id": "bot", "block_type": "agent/scripted", "config": agent},
            {"node_id": "calc", "block_type": "tool/calc"},
        ],
        "tools": tools,
    }
    with pytest.raises(ConfigError) as caught:
        Graph.from_config(config)
    assert said in str(caught.value) and "AGENT_TOOLS" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [({"node": "c", "describe": ""}, "describe"), ({"node": "c", "timeout": -1}, "timeout"), (["c"], "calc"), ({}, "node"), (7, "calc")],
)
def test_an_entry_of_another_form_is_refused_with_its_place(entry: Any, said: str) -> None:
    """02 G-26, 01 T-26: in a file by the schema, in code by validation."""
    graph = Graph("g")
    graph.add_node("agent/identity", "a", auto_connect=False)
    graph.add_node("tool/calc", "c", auto_connect=False)
    config = {**graph.to_config(), "tools": {"calc": entry}}
    with pytest.raises(ConfigError, match=said):
        Graph.from_config(config)
    if isinstance(entry, dict) and "node" in entry:
        graph.tools = {"calc": entry}
        with pytest.raises(ValidationError, match=f"{said}.*AGENT_TOOLS"):
            graph.validate()


def test_tools_without_an_agent_and_ids_that_come_twice_are_refused() -> None:
    """02 G-26 AGENT_TOOLS: tool table without an agent, duplicate tool id."""
    graph = Graph("g")
    graph.add_node(Scale(), "scale")
    graph.add_tool("scale", "scale")
    with pytest.raises(ValidationError, match="tools but no agent"):
        graph.validate()
    with pytest.raises(ToolError, match="already"):
        graph.add_tool("scale", "scale")
    text = "kind: graph\nid: g\nnodes: [{node_id: a, block_type: agent/identity}, {node_id: c, block_type: tool/calc}]\n"
    with pytest.raises(ConfigError, match="calc"):
        Graph.from_yaml_text(text + "tools:\n  calc: {node: c}\n  calc: {node: c}\n")


def test_what_a_tool_is_given_cannot_wait_for_its_agent() -> None:
    """02 G-49: predecessors run before the agent, so they are not behind it."""
    registry = new_registry()
    graph = graph_with(Listener([{"response": "x"}]), {"scale": Scale()})
    graph.add_node(registry.build({"block_type": "test/echo"}), "after")
    graph.add_edge("bot", "response", "after", "x")
    graph.add_edge("after", "y", "scale", "by")
    with pytest.raises(ValidationError, match="waits for the agent that calls it: "):
        graph.validate()
    direct = graph_with(Listener([{"response": "x"}]), {"echo": registry.build({"block_type": "test/echo"})})
    direct.add_edge("bot", "response", "echo", "x")
    with pytest.raises(ValidationError, match="of its own tool"):
        direct.validate()


def test_tools_come_back_from_configuration_whole() -> None:
    """02 G-51, 01 T-26: description, parameters, result and timeout."""
    graph = calc_graph(calls(call("sum", expression="1 + 1")), "{results}")
    graph.remove_node("echo")
    parameters = {
        "type": "object", "properties": {"expression": {"type": "string", "maxLength": 9}}, "required": ["expression"],
        "additionalProperties": False,
    }  # fmt: skip
    graph.add_tool("sum", "calc", description="Adds.", parameters=parameters, result_port="result", timeout=2)
    again = Graph.from_config(graph.to_config())
    assert again.tools == graph.tools and again.to_config() == graph.to_config()
    spec = again.agents()["agent"][-1].spec
    assert spec == ToolSpec("sum", "Adds.", parameters)
    assert again.run({"prompt": ""}) == {"response": "2"}
    short = Graph.from_config({**graph.to_config(), "tools": {"sum": "calc"}})
    assert short.tools == {"sum": {"node": "calc"}}
    short.remove_node("calc")
    assert short.run({"prompt": ""})["response"].startswith("there is no tool 'sum'")


def test_calls_without_any_tool_are_answered_or_handed_out() -> None:
    """02 G-49: where nobody hears `tool_calls` each is an error result; where it is exposed the caller answers."""
    graph = graph_with(Listener([calls(call("calc", expression="1")), "tell"]), {})
    assert "no tool 'calc'; tools: there are none" in graph.run({"prompt": ""})["response"]["results"][0]["error"]
    alone = Graph("alone")
    alone.add_node(scripted(calls(call("calc", "c1", expression="1")), "got {results}"), "bot")
    asked = alone.run({"context": "hi"})
    assert [c["tool_id"] for c in asked["tool_calls"]] == ["calc"]
    results = [{"call_id": "c1", "tool_id": "calc", "result": 1}]
    assert alone.run({"context": "hi", "tool_results": results}) == {"response": "got 1"}


# ---- sessions ----------------------------------------------------------------------------------------------------------------------


def test_a_session_survives_saving_in_the_middle(tmp_path: Path) -> None:
    """01 F-42, A-11: the conversation goes on where it was."""
    script = [calls(call("calc", expression="1")), "one: {results}", calls(call("calc", expression="2")), "two: {results}"]
    graph = calc_graph(*script)
    assert graph.run({"prompt": "first"}) == {"response": "one: 1"}
    graph.save(tmp_path / "agent")
    again = Graph.load(tmp_path / "agent")
    assert again.run({"prompt": "second"}) == {"response": "two: 2"}
    messages = again.nodes["agent"].child.messages  # type: ignore[attr-defined]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["first", "second"]
    assert graph.run({"prompt": "second"}) == {"response": "two: 2"}
    assert graph.nodes["agent"].child.messages == messages  # type: ignore[attr-defined]


def test_a_session_survives_saving_between_call_and_result(tmp_path: Path) -> None:
    """01 A-11: saved by a hook while a tool runs, loaded, and given the result."""
    graph = calc_graph(calls(call("calc", "c1", expression="5")), "five: {results}")

    def hook(event: Event) -> None:
        if event.kind == "tool_start":
            graph.save_checkpoint(tmp_path / "mid")

    graph.run({"prompt": "go"}, callbacks=[hook])
    again = Graph.from_config(graph.to_config())
    again.load_from_checkpoint(tmp_path / "mid")
    agent = again.nodes["agent"].child
    results = [{"call_id": "c1", "tool_id": "calc", "result": 5}]
    assert agent.forward({"context": "go", "tool_results": results}) == {"response": "five: 5"}
    assert [m["role"] for m in agent.messages] == ["user", "assistant", "tool", "assistant"]  # type: ignore[attr-defined]


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests/execution")
from test_agent import calc_graph, call, calls, SCRIPT
graph = calc_graph(*SCRIPT)
graph.run({"prompt": "first"})
def hook(event):
    if event.kind == "tool_start":
        graph.save(sys.argv[1])
        os.kill(os.getpid(), signal.SIGKILL)
graph.run({"prompt": "second"}, callbacks=[hook])
"""
SCRIPT = ["hello", calls(call("calc", "c1", expression="5")), "five: {results}"]


def test_a_session_survives_a_kill_between_call_and_result(tmp_path: Path) -> None:
    """04 X-5: the process is killed while a tool runs; a new one loads the folder and goes on with the result."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests")])
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], cwd=root, env={**os.environ, "PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL
    agent = Graph.load(tmp_path / "a").nodes["agent"].child
    assert [m["content"] for m in agent.messages if m["role"] == "user"] == ["first", "second"]  # type: ignore[attr-defined]
    results = [{"call_id": "c1", "tool_id": "calc", "result": 5}]
    assert agent.forward({"context": "second", "tool_results": results}) == {"response": "five: 5"}


def test_memory_of_a_run_ends_with_it() -> None:
    """01 F-42: `memory: run`."""
    agent = scripted(calls(call("scale", x=1, by=2)), "{results}", memory="run")
    graph = graph_with(agent, {"scale": Scale()})
    for _ in range(2):
        assert graph.run({"prompt": "again"}) == {"response": "2"}
        assert len(agent.messages) == 4

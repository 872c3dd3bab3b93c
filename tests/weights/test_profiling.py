"""Profiles: files that parse, seconds of nodes that add up, results that stay the same."""

from __future__ import annotations

import json
import pstats
from pathlib import Path
from typing import Any

import pytest

from wg_core import Block, Graph, Pipeline, Port, World
from wg_core.errors import ConfigError, MissingInputError, ProfilerBusyError
from wg_core.weights.profiling import KINDS, Profile


class Product(Block):
    """A product of random matrices."""

    ports = (Port("n", "in", "number"), Port("m", "out", "number"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        return {"m": inputs["n"] + float((torch.ones(8, 8) @ torch.ones(8, 8)).sum())}


def nested() -> Graph:
    """Two products, the second one in a graph of its own, and an agent that calls a tool."""
    inner = Graph("inner")
    inner.add_node(Product(), "second")
    graph = Graph("outer")
    graph.add_node(Product(), "first")
    graph.add_node("graph/ref", "inner", config={"graph": {"id": "g", "nodes": [{"node_id": "say", "block_type": "tool/calc"}]}})
    script = [{"tool_calls": [{"tool_id": "inner", "arguments": {"expression": "6 * 7"}}]}, "{results}"]
    graph.add_node("agent/scripted", "bot", config={"script": script})
    graph.add_tool("inner", "inner")
    graph.expose_input("first", "n", "n")
    graph.expose_input("bot", "context", "prompt")
    graph.expose_output("first", "m", "m")
    graph.expose_output("bot", "response", "said")
    return graph


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_changes_no_result_and_its_file_parses(kind: str, tmp_path: Path) -> None:
    """04 X-24: cProfile for pstats, PyTorch's as a trace; own seconds add up to those of the outermost nodes."""
    graph = nested()
    plain = graph.run({"n": 1, "prompt": "go"})
    with Profile(kind) as profile:
        assert graph.run({"n": 1, "prompt": "go"}, callbacks=[profile]) == plain
    found = {node.path: node for node in profile.table()}
    assert {"outer/first", "outer/bot", "outer/inner", "outer/inner/say"} <= set(found)
    assert all(node.calls == 1 for node in found.values())
    outermost = found["outer/first"].seconds + found["outer/bot"].seconds
    assert sum(node.own for node in found.values()) == pytest.approx(outermost) and outermost <= profile.seconds
    assert found["outer/bot"].own == pytest.approx(found["outer/bot"].seconds - found["outer/inner"].seconds)
    file = profile.write(tmp_path / "deep", "run")
    if kind == "cpu":
        called = {name for _, _, name in pstats.Stats(str(file)).stats}  # type: ignore[attr-defined]
        assert "forward" in called
    else:
        assert any(e.get("name") == "aten::mm" for e in json.loads(file.read_text())["traceEvents"])


def test_a_run_is_profiled_by_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """04 X-24: `profile` of a run writes file and table; values stay, on every level; a failed run leaves no file."""
    monkeypatch.setenv("WG_HOME", str(tmp_path / "home"))
    graph, given = nested(), {"n": 1, "prompt": "go"}
    plain = graph.run(given)
    heard: list[str] = []
    assert graph.run(given, profile=True, callbacks=[lambda e: heard.append(e.kind)]) == plain and "node_end" in heard
    folder = tmp_path / "home" / "profiles" / "outer"
    assert "forward" in {name for _, _, name in pstats.Stats(str(folder / "run.prof")).stats}  # type: ignore[attr-defined]
    rows = json.loads((folder / "run.nodes.json").read_text())
    assert {"outer/first", "outer/inner/say"} <= {row["path"] for row in rows} and rows[0].keys() >= {"calls", "seconds", "own"}
    pipeline = Pipeline("whole")
    pipeline.add_graph(graph, "g")
    assert pipeline.run(given, profile={"kind": "torch", "out": str(tmp_path / "p")}) == plain
    assert json.loads((tmp_path / "p" / "run.trace.json").read_text())["traceEvents"]
    stage = World.from_template("stub", world_id="isle").stages["philosopher"]
    assert stage.run({"state": {}}, seed=1, profile="cpu") == stage.run({"state": {}}, seed=1)
    assert (tmp_path / "home" / "profiles" / stage.id / "run.prof").is_file()
    with pytest.raises(ConfigError, match="'output'"):
        graph.run(given, profile={"output": "x"})
    with pytest.raises(ConfigError, match="cpu, torch"):
        graph.run(given, profile="gpu")
    with Profile(), pytest.raises(ProfilerBusyError):
        graph.run(given, profile=True)
    with pytest.raises(MissingInputError):
        graph.run({}, profile={"out": str(tmp_path / "none")})
    assert not (tmp_path / "none").exists()


def test_profilers_do_not_nest_and_know_their_kinds() -> None:
    """04 X-24."""
    with pytest.raises(ConfigError, match="cpu, torch"):
        Profile("gpu")
    for outer in KINDS:
        with Profile(outer), pytest.raises(ProfilerBusyError, match="another profiler"), Profile("cpu"):
            pass
    with pytest.raises(ZeroDivisionError), Profile() as profile:
        print(1 / 0)
    assert profile.seconds > 0
    with Profile():
        pass

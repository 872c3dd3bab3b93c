"""Pictures in text and the plan as data, for every level."""

from __future__ import annotations

import json
import re

import pytest
from blocks_for_tests import Add, Affine, Const, Echo, LoopInfo, TwoStep, chain, cycle

from wg_core import Block, Graph, Pipeline, Stage, World
from wg_core.execution.node import LoopSpec


def branching() -> Pipeline:
    """One graph with a loop feeds another; one input feeds two nodes."""
    loop = cycle(Affine(scale=2), id="loop")
    last = Graph("last")
    last.add_node(Add(), "sum")
    last.add_node(Echo(), "echo")
    last.expose_input("sum", "a", "x")
    last.expose_input("echo", "x", "x")
    last.expose_output("sum", "y", "y")
    pipeline = Pipeline("p")
    pipeline.add_graph(loop)
    pipeline.add_graph(last)
    pipeline.add_edge("loop", "y", "last", "x")
    return pipeline


def staged() -> Stage:
    stage = Stage("s", reads=["intent"], writes=["outcome"], inputs={"x": "intent.text"}, outputs={"outcome.narrative": "y"})
    stage.add_pipeline(chain(Echo(), id="g"))
    return stage


def test_mermaid_nests_levels_and_dashes_carries() -> None:
    """02 G-42."""
    assert branching().to_mermaid().splitlines() == [
        "flowchart LR",
        '  subgraph n0["pipeline p"]',
        '    subgraph n1["loop: graph"]',
        '      n2["n0: Affine"]',
        "    end",
        '    subgraph n3["last: graph"]',
        '      n4["sum: Add"]',
        '      n5["echo: Echo"]',
        "    end",
        "  end",
        '  n6(["loop:x"])',
        '  n7(["last:y"])',
        '  n2 -.->|"y to x"| n2',
        '  n2 -->|"y to x"| n4',
        '  n2 -->|"y to x"| n5',
        "  n6 --> n2",
        "  n4 --> n7",
    ]


def test_dot_nests_levels_and_dashes_carries() -> None:
    """02 G-42."""
    text = branching().to_dot()
    assert "    subgraph cluster_n1 {\n      label=\"loop: graph\";\n      n2 [label=\"n0: Affine\"];\n    }\n" in text
    assert '  n2 -> n2 [label="y to x" style=dashed];\n' in text
    assert text.count("dashed") == 1
    assert text.count("{") == text.count("}") == 4


def test_every_level_has_both_pictures() -> None:
    """02 G-42: all blocks are there, in a world the cycle too, with the way back dashed."""
    world = World.from_template("stub", world_id="isle")
    for level in (chain(Affine()), branching(), staged(), world):
        for text, box, dashed in ((level.to_mermaid(), r'^ +n\d+\["', "-.->"), (level.to_dot(), r"^ +n\d+ \[", "dashed")):
            names = {k for k in re.findall(box, text, re.M)}
            assert names, text
            assert len(re.findall(box, text, re.M)) >= sum(1 for _ in level.iter_blocks())
            assert (dashed in text) is (level in (world,) or isinstance(level, Pipeline)), text
    for role in world.cycle:
        assert role in world.to_mermaid()
    assert "next step" in world.to_dot()


@pytest.mark.parametrize("title", ['say "end"]; x --> y', "a\nsubgraph b", "<b>#35;</b>", "back\\slash\\", "{}|<>", "плато ☃"])
def test_names_are_escaped(title: str) -> None:
    """02 G-42: free text can end no label and begin no line."""

    class Odd(Block):
        ports = Affine.ports

        @property
        def name(self) -> str:
            return title

    plain = chain(Affine())
    graph = chain(Odd())
    graph.title = title
    assert len(graph.to_mermaid().splitlines()) == len(plain.to_mermaid().splitlines())
    assert len(graph.to_dot().splitlines()) == len(plain.to_dot().splitlines())
    for line in graph.to_mermaid().splitlines()[1:3]:
        assert re.fullmatch(r' *(subgraph )?n\d\["[\w ./:,()+#;-]*"\]', line), line
    for line in graph.to_dot().splitlines()[3:5]:
        assert re.fullmatch(r' *(n\d \[)?label="([^"\\]|\\\\|\\")*"\]?;', line), line


def test_the_plan_as_data() -> None:
    """02 G-42: steps, loop order, carry edges, seeds, N; plain JSON, nested levels within."""
    graph = Graph("g")
    graph.add_node(Const(value=[]), "start")
    graph.add_node(TwoStep(), "solve")
    graph.add_node(LoopInfo(), "note")
    graph.add_node(Echo(), "after")
    graph.add_edge("start", "y", "solve", "x")
    graph.add_edge("solve", "y", "note", "x")
    graph.add_edge("note", "y", "solve", "x", carry=True)
    graph.add_edge("note", "y", "after", "x")
    graph.expose_output("after", "y", "y")
    graph.set_loops([LoopSpec("solve", num_steps=3, until={"node": "note", "port": "y"})])
    data = Pipeline.from_graph(graph).plan_data()
    assert json.loads(json.dumps(data)) == data
    (step,) = data["steps"]
    assert (data["level"], data["outputs"], step["node"], step["kind"]) == ("pipeline", ["y"], "g", "graph g")
    assert step["plan"]["steps"] == [
        {"node": "start", "kind": "Const"},
        {
            "loop": "solve", "num_steps": 3, "steps_from": "loops", "iterations": 5, "until": "note.y",
            "carry": [{"edge": "note.y ~> solve.x", "seed": ["start.y -> solve.x"]}],
            "steps": [{"node": "solve", "kind": "TwoStep"}, {"node": "note", "kind": "LoopInfo"}],
        },
        {"node": "after", "kind": "Echo"},
    ]  # fmt: skip


def test_the_plan_says_what_a_run_would_do() -> None:
    """02 G-34: N of the run, by loop or for all; seeds from an input and from a default."""
    graph = cycle(Affine(), Affine())
    loop = graph.plan_data(4)["steps"][0]
    assert (loop["num_steps"], loop["steps_from"]) == (4, "run")
    assert loop["carry"] == [{"edge": "n1.y ~> n0.x", "seed": ["input x"]}]
    assert graph.plan_data({"n0": 6})["steps"][0]["num_steps"] == 6
    assert graph.plan_data({"other": 6})["steps"][0]["steps_from"] == "default"
    graph.unexpose_input("x")
    graph.set_default("n0", "x", 1)
    assert graph.plan_data()["steps"][0]["carry"][0]["seed"] == ["default"]


def test_it_is_the_order_of_the_run() -> None:
    """02 G-42: the data, the steps and the plan agree."""
    graph = branching()
    flat = [s["node"] for s in graph.plan_data()["steps"]]
    assert flat == graph.plan().order() == ["loop", "last"]
    assert [s.node_id for s in graph.steps({"loop:x": 1})] == ["loop", "n0", "last", "sum", "echo"]

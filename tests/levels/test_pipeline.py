"""Pipeline: whole graphs joined by their external ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blocks_for_tests import Affine, Calls, Const, Fails, Join, Saw, Typed, Weights, chain, cycle

from wg_core import BlockRegistry, ConfigError, Graph, ModelPool, Pipeline
from wg_core.errors import EdgeError, MissingInputError, NodeError, NodeExecutionError


def test_linear_branching_and_joining() -> None:
    """02 P-7, P-8."""
    pipeline = Pipeline("p")
    for name, scale in (("left", 2), ("right", 3)):
        pipeline.add_graph(chain(Affine(scale=scale), id=name))
    total = Graph("total")
    total.add_node(Join(how="sum"), "sum")
    total.expose_input("sum", "x", "x")
    total.expose_output("sum", "y", "y")
    pipeline.add_graph(chain(Affine(offset=1), id="first"))
    pipeline.add_graph(total)
    for name in ("left", "right"):
        pipeline.add_edge("first", "y", name, "x")
        pipeline.add_edge(name, "y", "total", "x")
    pipeline.expose_input("first", "x", "x")
    pipeline.expose_output("total", "y", "y")
    assert pipeline.run({"x": 1}) == {"y": 10}
    assert pipeline.plan().order() == ["first", "left", "right", "total"]


def test_a_pipeline_of_one_graph_has_its_contract() -> None:
    """02 P-2."""
    graph = cycle(Affine(scale=2), id="g")
    pipeline = Pipeline.from_graph(graph)
    keys = ("key", "types", "required", "optional", "aggregation")
    for spec in ("get_input_spec", "get_output_spec"):
        assert [{k: e[k] for k in keys} for e in getattr(pipeline, spec)()] == [
            {k: e[k] for k in keys} for e in getattr(graph, spec)()
        ]
    assert pipeline.run({"x": 1}, num_loop_steps=3) == graph.run({"x": 1}, num_loop_steps=3) == {"y": 8}


def test_inputs_outputs_and_defaults_of_graphs() -> None:
    """02 P-5, P-8: optional inputs may stay unfed; node defaults count."""
    graph = Graph("g")
    graph.add_node(Saw(), "a")
    pipeline = Pipeline("p")
    pipeline.add_graph(graph, "one", defaults={"x": 5})
    pipeline.add_graph(graph, "two")
    assert pipeline.run() == {"one:y": {"x": 5, "with_default": []}, "two:y": {"with_default": []}}


def test_a_graph_keeps_its_own_id_under_a_node_id() -> None:
    """02 P-3."""
    pipeline = Pipeline("p")
    graph = chain(Affine(), id="g")
    assert pipeline.add_graph(graph) == "g"
    assert pipeline.add_graph(graph, "second") == "second"
    assert graph.id == "g"
    with pytest.raises(NodeError, match="p: node id 'g' is taken"):
        pipeline.add_graph(graph)


def test_types_are_checked_between_graphs() -> None:
    """02 P-5, G-26 TYPE_MISMATCH."""
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(Typed(gives="text"), id="writes"))
    pipeline.add_graph(chain(Affine(), id="counts"))
    with pytest.raises(EdgeError, match=r"p/counts\.x takes 'number' but writes\.y gives 'text'; put a block between"):
        pipeline.add_edge("writes", "y", "counts", "x")
    with pytest.raises(EdgeError, match="p/writes has no port 'out'; known: 'y'"):
        pipeline.add_edge("writes", "out", "counts", "x")


def test_aggregation_reaches_through_the_border() -> None:
    """02 P-5: several edges into one graph input, as its port says, with its separator and its names."""
    for how, more, expected in (
        ("concat", {"agg_sep": "+"}, "a+b"),
        ("dict", {}, {"a:y": "a", "b:y": "b"}),
        ("first", {}, "a"),
    ):
        from wg_core import Block, Port

        class Takes(Block):
            ports = (Port("x", "in", "any", aggregation=how, **more), Port("y", "out"))  # type: ignore[arg-type]

            def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
                return {"y": inputs["x"]}

        pipeline = Pipeline("p")
        for name in ("a", "b"):
            pipeline.add_graph(chain(Const(value=name), id=name))
        pipeline.add_graph(chain(Takes(), id="takes"))
        for name in ("a", "b"):
            pipeline.add_edge(name, "y", "takes", "x")
        assert pipeline.run() == {"takes:y": expected}


def test_errors_name_the_whole_path_and_missing_inputs_the_level() -> None:
    """02 G-37."""
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(Fails(), id="g"), "node")
    with pytest.raises(NodeExecutionError, match=r"p/node/n0 failed: ValueError: out of ink"):
        pipeline.run()
    pipeline = Pipeline.from_graph(chain(Affine(), id="g"))
    with pytest.raises(MissingInputError, match="g needs 'x'; given: nothing"):
        pipeline.run()


def test_a_change_inside_a_child_is_seen_by_the_pipeline() -> None:
    """02 G-30, P-1."""
    graph = chain(Affine(), id="g")
    pipeline = Pipeline.from_graph(graph)
    assert pipeline.run({"x": 1}) == {"y": 1}
    graph.unexpose_output("y")
    graph.expose_output("n0", "y", "result")
    assert pipeline.run({"x": 1}) == {"result": 1}


def test_two_graphs_with_one_reference_share_one_block(registry: BlockRegistry) -> None:
    """02 acceptance 2, P-4: one block object, each parameter once, the same output as with two copies."""

    def build(**config: Any) -> Pipeline:
        node = {"node_id": "w", "block_type": "test/weights", "config": {"checkpoint_ref": "m", "scale": 2.0, **config}}
        graphs = [{"kind": "graph", "id": name, "nodes": [node]} for name in ("one", "two")]
        entry = {
            "id": "p",
            "nodes": [{"node_id": g["id"], "config": g} for g in graphs],
            "edges": [{"source_node": "one", "source_port": "y", "target_node": "two", "target_port": "x"}],
        }
        return Pipeline.from_config(entry, registry=registry, pool=ModelPool())

    shared, separate = build(), build(reuse=False)
    assert len(list(shared.iter_blocks())) == 1
    assert len(list(separate.iter_blocks())) == 2
    assert len(shared.trainable_parameters()) == 1
    assert list(shared.state_dict()) == ["one/w:weight", "one/w:steps"]
    x = torch.ones(1, 2)
    assert torch.equal(shared.run({"one:x": x})["two:y"], separate.run({"one:x": x})["two:y"])
    assert shared.validate(deep=True).is_valid


def test_round_trip_with_files_and_refs(registry: BlockRegistry, tmp_path: Path) -> None:
    """02 G-51, G-54."""
    pipeline = Pipeline("p")
    graph = Graph("g")
    graph.add_node("test/affine", "a", config={"scale": 2}, registry=registry)
    pipeline.add_graph(graph, "one", trainable=False)
    pipeline.add_graph(graph, "two", defaults={"x": 4})
    pipeline.expose_input("one", "x", "x")
    pipeline.expose_output("one", "y", "y")
    pipeline.expose_output("two", "y", "z")
    config = pipeline.to_config()
    again = Pipeline.from_yaml(pipeline.save_config(tmp_path / "p.yaml"), registry=registry)
    assert again.to_config() == config
    assert again.run({"x": 1}) == {"y": 2, "z": 8}
    graph.save_config(tmp_path / "g.yaml")
    (tmp_path / "q.yaml").write_text("kind: pipeline\nid: q\nnodes:\n  - node_id: g\n    config: {ref: g.yaml}\n")
    assert Pipeline.from_yaml(tmp_path / "q.yaml", registry=registry).run({"x": 1}) == {"y": 2}
    (tmp_path / "g.yaml").write_text("kind: graph\nnodes:\n  - {node_id: a, block_type: test/afine}\n")
    with pytest.raises(ConfigError, match=r"g\.yaml:3: nodes\.0\.config\.nodes\.0: block type 'test/afine' is not registered"):
        Pipeline.from_yaml(tmp_path / "q.yaml", registry=registry)


def test_training_is_chosen_by_path() -> None:
    """02 T, G-39: into graphs, with all others frozen."""
    pipeline = Pipeline("p")
    for name in ("one", "two"):
        pipeline.add_graph(chain(Weights(), Weights(), id=name))
    pipeline.set_trainable("two/n1", freeze_others=True)
    assert [n for n, _ in pipeline.named_trainable_parameters()] == ["two/n1:weight"]
    with pytest.raises(NodeError, match="two has no node 'n7'"):
        pipeline.set_trainable("two.n7")


def test_a_pipeline_calls_each_graph_once() -> None:
    """02 P-7: values in memory by reference."""
    block = Calls()
    pipeline = Pipeline("p")
    pipeline.add_graph(chain(block, id="g"))
    pipeline.add_graph(chain(Affine(), id="h"))
    pipeline.add_edge("g", "y", "h", "x")
    assert pipeline.run({"g:x": 2}) == {"h:y": 2}
    assert block.calls == 1

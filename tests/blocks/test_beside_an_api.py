"""What can learn beside a model behind an API: a text adapter by scored search, and a local output head."""

from __future__ import annotations

from pathlib import Path

import pytest

from wg_blocks.head import OutputHead
from wg_blocks.prefix import TextPrefix
from wg_core import Graph
from wg_core.errors import ConfigError, NodeExecutionError, StateDictError
from wg_core.weights.training_config import TrainingConfig

FAR = {"backend": "api", "provider": "fake", "model_id": "far-1"}


def told() -> Graph:
    graph = Graph("told")
    graph.add_node("text/prefix", "style")
    graph.add_node("llm/api", "llm", config=FAR)
    graph.add_edge("style", "prefixed", "llm", "prompt")
    graph.expose_input("style", "text", "text")
    graph.expose_output("llm", "text", "text")
    return graph


def test_a_prefix_is_found_by_its_score_and_kept(tmp_path: Path) -> None:
    """03 L-8, 02 T-8: gradient-free, so no parameter; what was found is state like weights."""
    graph = told()
    block = graph.nodes["style"].child
    assert isinstance(block, TextPrefix) and not list(graph.named_trainable_parameters())
    said: dict[str, str] = {}

    def score(prefix: str) -> float:
        said[prefix] = graph.run({"text": "What happened?"}, seed=3)["text"]
        return -len(said[prefix])

    candidates = ["Be brief.", "Tell it as a sailor.", "Count the boats.", "Name the weather."]
    found = block.search(candidates, score)
    assert set(found.scores) == {"", *candidates} and len(set(said.values())) == 5
    assert found.best == block.prefix == min(said, key=lambda prefix: len(said[prefix]))
    assert graph.run({"text": "What happened?"}, seed=3)["text"] == said[found.best]
    graph.save(tmp_path / "saved")
    again = Graph.load(tmp_path / "saved")
    assert again.run({"text": "What happened?"}, seed=3)["text"] == said[found.best]


def test_a_search_that_fails_changes_nothing() -> None:
    """03 L-8."""
    block = TextPrefix(prefix="Calm.")
    with pytest.raises(ConfigError, match="is no number"):
        block.search(["x"], lambda p: float("nan") if p == "x" else 1.0)
    with pytest.raises(ConfigError, match="no candidate"):
        block.search(["Calm."], lambda p: 1.0)
    with pytest.raises(StateDictError):
        block.load_state_dict({"prefix": 3})
    assert block.prefix == "Calm." and block.search(["x", "y"], lambda p: 0.0).best == "Calm."


def test_an_output_head_learns_on_the_vectors_of_an_api() -> None:
    """03 L-8, 02 T-8: the API gives no gradient; the head behind it learns to tell texts apart."""
    graph = Graph("judge")
    graph.add_node("embedding/api", "far", config={**FAR, "dimensions": 16})
    graph.add_node("projection/head", "head", config={"width_in": 16, "width_out": 2, "hidden": 8})
    graph.add_edge("far", "embedding", "head", "tensor")
    graph.expose_input("far", "input", "texts")
    graph.expose_output("head", "tensor_out", "scores")
    assert {name.partition(":")[0] for name, _ in graph.named_trainable_parameters()} == {"head"}
    texts = ["The tide turns.", "A storm lands.", "The bell rings.", "Boats wait."]
    example = {"inputs": {"texts": texts}, "targets": {"kind": [0, 1, 0, 1]}}
    plan = TrainingConfig(steps=60, lr=0.05, loss=({"output": "scores", "target": "kind", "kind": "cross_entropy"},))  # type: ignore[arg-type]
    result = graph.fit([example], plan)
    assert result.loss is not None and result.loss < 0.05
    assert graph.run({"texts": texts})["scores"].argmax(-1).tolist() == [0, 1, 0, 1]
    narrow = Graph("narrow")
    narrow.add_node(OutputHead(width_in=3, width_out=2), "head")
    narrow.expose_input("head", "tensor", "x")
    with pytest.raises(NodeExecutionError, match="last dimension must be 3"):
        narrow.run({"x": [1.0, 2.0]})

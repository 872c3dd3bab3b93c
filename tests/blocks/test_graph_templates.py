"""The graph templates: they run as they are, do what they promise, and take other blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wg_core import ConfigError, Graph
from wg_core.assembly.template import default_templates
from wg_core.errors import MissingInputError, TemplateParameterError, UnknownTemplateError

NAMES = ["text_to_image", "image_to_image", "upscale", "text_to_text", "agent_with_tools"]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.arange(48.0).reshape(1, 3, 4, 4) / 48


@pytest.mark.parametrize("name", NAMES)
def test_every_template_builds_without_warnings_and_round_trips(name: str) -> None:
    graph = Graph.from_template(name)
    assert graph.id == name
    result = graph.validate()
    assert not result.issues, str(result)
    assert Graph.from_config(graph.to_config()).to_config() == graph.to_config()


def test_text_to_image_gives_an_image() -> None:  # proves 01 A-14
    graph = Graph.from_template("text_to_image")
    out = graph.run({"prompt": "a house by the sea"})
    assert set(out) == {"image"} and out["image"].shape == (1, 3, 64, 64)
    assert out["image"].min() >= 0 and out["image"].max() <= 1
    assert graph.plan().loops[0].num_steps == 8
    with pytest.raises(Exception, match="tok") as caught:
        graph.run({})
    assert isinstance(caught.value.__cause__, MissingInputError)


def test_guidance_adds_a_branch_on_the_same_blocks() -> None:
    graph = Graph.from_template("text_to_image", guidance="guidance/cfg", steps=3, scale=2.0)
    edges = {str(e) for e in graph.edges}
    assert {"net.pred -> cfg.pred_cond", "net0.pred -> cfg.pred_uncond", "cfg.pred_guided -> stp.pred"} <= edges
    assert "net.pred -> stp.pred" not in edges
    assert (
        graph.nodes["net0"].child is graph.nodes["net"].child and graph.nodes["neg"].child is graph.nodes["txt"].child
    )
    assert [e["key"] for e in graph.get_input_spec()] == ["prompt", "negative"]
    assert (
        graph.run({"prompt": "sea"})["image"].shape == graph.run({"prompt": "sea", "negative": "rain"})["image"].shape
    )


def test_parts_can_be_replaced() -> None:
    graph = Graph.from_template(
        "text_to_image",
        tokenizer="tokenizer/bytes",
        conditioner="conditioner/toy",
        backbone={"block_type": "backbone/toy"},
        initializer="initializer/noise",
        solver="solver/euler",
        codec="codec/toy",
        guidance="guidance/cfg",
        steps=2,
        shape=[1, 4, 8, 8],
    )
    first, second, other = (graph.run({"prompt": "sea"}, seed=s)["image"] for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.ndim == 4 and first.shape[1] == 3


def test_image_to_image_begins_with_the_image(image: torch.Tensor) -> None:
    graph = Graph.from_template("image_to_image")
    assert torch.equal(graph.run({"prompt": "sea", "image": image})["image"], image)
    assert graph.nodes["enc"].child is graph.nodes["dec"].child, "one codec, two nodes"
    assert "enc" not in graph.plan().loops[0].nodes and "dec" not in graph.plan().loops[0].nodes


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upscale_enlarges(image: torch.Tensor, factor: int) -> None:
    out = Graph.from_template("upscale", factor=factor).run({"image": image})["image"]
    assert out.shape == (1, 3, 4 * factor, 4 * factor)
    assert torch.equal(out[..., ::factor, ::factor], image)
    assert torch.equal(out[..., factor - 1 :: factor, factor - 1 :: factor], image)


def test_text_to_text_answers() -> None:
    graph = Graph.from_template("text_to_text")
    assert graph.run({"prompt": "hello", "system": "be kind"}) == {"text": "hello"}
    with pytest.raises(MissingInputError, match="'prompt'"):
        graph.run({})


def test_agent_with_tools_answers_and_has_its_tools() -> None:
    graph = Graph.from_template("agent_with_tools")
    assert graph.run({"prompt": "hello"}) == {"response": "hello"}
    assert graph.tools == {"echo": {"node": "echo"}, "calc": {"node": "calc"}}
    assert graph.plan().order() == ["agent"]
    assert graph.nodes["calc"].child.run({"expression": "6 * 7"}) == {"result": 42}
    named = Graph.from_template("agent_with_tools", tools={"sum": "tool/calc", "product": "tool/calc"})
    assert set(named.tools) == {"sum", "product"}
    assert Graph.from_template("agent_with_tools", agent="agent/identity", tools=[]).tools == {}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("text_to_image", {"backbones": "backbone/toy"}, "did you mean 'backbone'"),
        ("text_to_image", {"steps": 0}, "steps is 0"),
        ("text_to_image", {"steps": True}, "steps is True"),
        ("text_to_image", {"shape": [1, -3, 4, 4]}, "shape is -3"),
        ("text_to_image", {"backbone": 7}, "backbone is a block type"),
        ("upscale", {"factor": 1.5}, "factor is 1.5"),
        ("upscale", {"enlarge": {"block_type": "image/enlarge", "factor": 2}}, "is a block type or"),
        ("agent_with_tools", {"tools": "tool/calc"}, "tools is a list"),
        ("agent_with_tools", {"tools": ["tool/calc", "tool/calc"]}, "same name"),
    ],
)
def test_wrong_parameters_are_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateParameterError, match=message):
        Graph.from_template(name, **parameters)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="net has no port"):
        Graph.from_template("text_to_image", backbone="codec/identity")
    with pytest.raises(ConfigError, match="factor is 99"):
        Graph.from_template("upscale", factor=99)


def test_templates_are_listed_with_their_parameters() -> None:
    listed = default_templates().list("graph")
    assert set(NAMES) <= set(listed)
    assert listed["text_to_text"]["llm"] == "llm/identity"
    with pytest.raises(UnknownTemplateError, match="did you mean 'text_to_image'"):
        Graph.from_template("text_to_imag")

"""Search by meaning: the local embedding block, and what a world's view finds through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_bert import save_tiny_bert

from wg_blocks.embedding_local import SentenceEmbedding
from wg_blocks.store import ModelStore
from wg_blocks.text import Context
from wg_core import World, WorldContent
from wg_core.assembly.registry import default_registry
from wg_core.errors import ConfigError, MissingModelError, PortValueError
from wg_core.state.canonical import canonical_json

TEXTS = ["the ship sank", "price of grain rose", "the old lamp keeper", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny_bert"))


def test_mean_pooling_and_length_1(folder: Path) -> None:
    """01 role embedding: the mean of the tokens' states without padding, scaled to 1, alike alone and in a batch."""
    import torch

    block = SentenceEmbedding(checkpoint_ref=str(folder))
    assert not block.materialized
    many = block.run({"input": TEXTS}, strict_types=True)["embedding"]
    assert tuple(many.shape) == (4, 32) and torch.allclose(many.norm(dim=1), torch.ones(4))
    for text, vector in zip(TEXTS, many, strict=True):
        assert torch.allclose(block.run({"input": text})["embedding"], vector, atol=1e-5)
    encoder, tokens = block.modules["encoder"], block._tokenizer(TEXTS[0], return_tensors="pt")
    mean = encoder(**tokens).last_hidden_state[0].mean(0)
    assert torch.allclose(many[0], mean / mean.norm(), atol=1e-5)
    assert block.run({"input": []})["embedding"].shape == (0, 32)
    assert len(list(block.named_parameters())) > 10 and block.weight_hash() is not None
    with pytest.raises(PortValueError, match="a text or a list of texts"):
        block.run({"input": [3]})


def test_a_text_counts_up_to_max_tokens(folder: Path) -> None:
    """Truncation is as stated: what lies behind `max_tokens` changes nothing."""
    short = SentenceEmbedding(checkpoint_ref=str(folder), max_tokens=5)
    one, other, early = short.run({"input": ["the old lamp sank", "the old lamp rose", "the old king sank"]})["embedding"]
    assert one.equal(other) and not one.equal(early)
    with pytest.raises(ConfigError, match="3 to 512"):
        SentenceEmbedding(max_tokens=1)


def test_a_missing_model_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """O-3: building needs no file; the first call names the command."""
    monkeypatch.setenv("WG_HOME", str(tmp_path))
    block = SentenceEmbedding()
    assert block.weight_hash() is None
    with pytest.raises(MissingModelError, match="wg models pull minilm-l6-v2"):
        block.run({"input": "x"})


def config(folder: Path | str) -> dict[str, Any]:
    return {"block_type": "embedding/minilm", "config": {"checkpoint_ref": str(folder)}}


def test_a_view_is_ranked_by_the_model_and_nothing_is_embedded_twice(folder: Path) -> None:
    """C-3, W-27: the block and the tool rank by cosine; an item that did not change is embedded once in a process."""
    registry = default_registry()
    block = registry.build({"block_type": "world/context", "config": {"search": config(folder)}})
    asked: list[int] = []
    inner = block.get_sub_blocks()["search"]
    forward = inner.forward
    inner.forward = lambda inputs: asked.append(len(inputs["input"])) or forward(inputs)  # type: ignore[method-assign]
    view = WorldContent.from_seed({"characters": [{"id": f"c{i}", "description": t} for i, t in enumerate(TEXTS[:3])]}).view()
    first = block.run({"world": view, "query": "the boat went down"})["items"]
    vectors = inner.run({"input": ["the boat went down", *(f"c{i} (entity): {t}" for i, t in enumerate(TEXTS[:3]))]})
    cosines = (vectors["embedding"][1:] @ vectors["embedding"][0]).tolist()
    wanted = [f"entity:c{i}" for i in sorted(range(3), key=lambda i: -cosines[i]) if cosines[i] > 0.2]
    assert [item["source"] for item in first] == (wanted or ["entity:c0", "entity:c1", "entity:c2"])
    del asked[:]
    assert block.run({"world": view, "query": "the boat went down"})["items"] == first and asked == []
    block.run({"world": view, "query": "king"})
    assert asked == [1]  # the query alone
    tool = registry.build({"block_type": "tool/search_content", "config": {"search": config(folder)}})
    found = tool.run({"world": view, "query": "the boat went down"})["result"]
    assert [item["source"] for item in found] == wanted
    with pytest.raises(ConfigError, match="'embedding' is needed"):
        Context(search={"block_type": "llm/fake"})


@pytest.mark.parametrize("kind", ["minilm", "api"])
def test_a_world_names_its_search_model_and_replays_without_it(tmp_path: Path, folder: Path, kind: str) -> None:
    """C-3, design `wg replay`: the model is one of the world's; the order found is recorded, so a replay asks nobody."""
    text = World.from_template("stub", world_id="trial", seed=5).to_config()
    named = config(folder) if kind == "minilm" else {
        "block_type": "embedding/api", "config": {"backend": "api", "provider": "fake", "model_id": "near"}
    }  # fmt: skip
    text["execution"]["models"] = {**text["execution"].get("models", {}), "near": named}
    for stage in text["execution"]["stages"].values():
        for node in stage["graph"]["nodes"] if "graph" in stage else ():
            if node.get("block_type") == "world/context":
                node["config"] = {"limit": 8, "search": {"model": "near"}}
    exposed = text["execution"]["stages"]["author"]["graph"]["exposed_inputs"]
    exposed.append({"name": "intent", "node_id": "context", "port_name": "query"})
    world = World.from_yaml_text(canonical_json(text))
    world.set_storage(tmp_path)
    list(world.evolve(3))
    assert any("minilm" in key or "near" in key for key in world.models())
    calls = [c for log in world.calls(world.history()[-1]).values() for c in log if c["model"].startswith("search:")]
    assert calls and all(set(c["request"]) == {"query", "texts"} for c in calls)
    for block in world.iter_blocks():
        if block.role == "embedding":
            block.forward = _refuse  # type: ignore[method-assign]
    for step in range(3):
        again = world.replay(step)
        assert again.same and again.unused_calls == 0
    with pytest.raises(ConfigError, match=r"model 'neer'.*did you mean 'near'"):
        World.from_yaml_text(canonical_json(text).replace('"model":"near"', '"model":"neer"'))


def _refuse(inputs: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("no model is asked in a replay")


@pytest.mark.slow
def test_the_published_model_finds_an_entry_without_a_shared_word() -> None:
    """C-3, O-1: MiniLM puts the right event first where words say nothing."""
    try:
        ModelStore().path("minilm-l6-v2")
    except MissingModelError as missing:
        pytest.skip(str(missing))
    events = ["A vessel sank off the northern rocks.", "The baker wed the miller's daughter.", "Grain became dearer."]
    places = [{"id": f"e{i}", "description": event} for i, event in enumerate(events)]
    view = WorldContent.from_seed({"places": places}).view()
    block = Context(search={"block_type": "embedding/minilm"})
    for query, wanted in (("shipwreck", "e0"), ("marriage", "e1"), ("expensive wheat", "e2")):
        assert block.run({"world": view, "query": query})["items"][0]["source"] == f"place:{wanted}"
        assert view.search(query) == []

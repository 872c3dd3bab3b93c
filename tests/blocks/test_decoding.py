"""How a local language model decodes: kept prefixes, pieces of text, batches, and weights of 8 bits."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import save_tiny_lm

from wg_blocks.decoding import PIECE, PrefixCache, read_prompt
from wg_blocks.llm_local import CausalLM
from wg_blocks.lora import LoRA
from wg_core import Graph, ModelPool
from wg_core.assembly.registry import default_registry
from wg_core.errors import AbortRun, AdapterError, ConfigError, NodeExecutionError

SYSTEM = "You write the chronicle of a small harbour town, calm and concrete. Numbers such as 0, 1, 2 are written out."
LONG = {"max_new_tokens": 40, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def block(folder: Path) -> CausalLM:
    return CausalLM(checkpoint_ref=str(folder))


def graph_of(block: CausalLM) -> Graph:
    graph = Graph("g")
    graph.add_node(block, "llm")
    for name in ("prompt", "system", "schema", "params"):
        graph.expose_input("llm", name, name)
    for name in ("text", "usage"):
        graph.expose_output("llm", name, name)
    return graph


def cached(graph: Graph, **inputs: Any) -> tuple[str, int, int]:
    """The answer, tokens of the prompt, and those of them that needed no computing."""
    seen: list[Any] = []
    out = graph.run(inputs, callbacks=(lambda e: e.kind == "model_call" and seen.append(e.data),))
    return out["text"], seen[0]["prompt_tokens"], seen[0]["cached_tokens"]


def test_a_prefix_that_is_known_is_not_computed_again_and_changes_no_bit(block: CausalLM) -> None:
    """03 W-20: one model serves all stages; what their prompts share is computed once."""
    block.materialize()
    ids = block._prompt_ids([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What of the ice?"}])
    other = block._prompt_ids([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who keeps it?"}])
    same = next(i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
    assert same > PIECE
    prefixes = PrefixCache()
    with torch.no_grad():
        plain, cache, none = read_prompt(block.module, ids, None, ())
        _, _, first = read_prompt(block.module, other, prefixes, ())
        scores, reused, known = read_prompt(block.module, ids, prefixes, ())
        assert (none, first, known) == (0, 0, same // PIECE * PIECE)
        assert torch.equal(plain, scores)
        for ours, theirs in zip(cache.layers, reused.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert read_prompt(block.module, ids, prefixes, ("other weights",))[2] == 0


def test_stages_of_one_step_share_their_prefix(block: CausalLM, folder: Path) -> None:
    graph = graph_of(block)
    ask = {"system": SYSTEM, "params": LONG}
    first = cached(graph, prompt="What of the ice?", **ask)
    second = cached(graph, prompt="Who keeps it?", **ask)
    again = cached(graph, prompt="Who keeps it?", **ask)
    assert first[2] == 0 < second[2] and again[2] == (again[1] - 1) // PIECE * PIECE
    fresh = graph_of(CausalLM(checkpoint_ref=str(folder)))
    assert cached(fresh, prompt="Who keeps it?", **ask)[0] == second[0] == again[0]
    out = graph.run({"prompt": "Who keeps it?", **ask})
    assert "cached_tokens" not in out["usage"]  # equal inputs give equal outputs, whatever is kept


def test_a_prefix_is_that_of_its_weights_and_adapters(block: CausalLM) -> None:
    graph = graph_of(block)
    ask = {"prompt": "Who keeps it?", "system": SYSTEM, "params": LONG}
    plain, _, _ = cached(graph, **ask)
    adapter = LoRA(target="llm", modules=["*v_proj"])
    graph.add_node(adapter, "style")
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.fill_(0.3)
    assert cached(graph, **ask)[2] == 0
    assert cached(graph, **ask)[2] > 0
    graph.remove_node("style")
    text, _, known = cached(graph, **ask)
    assert text == plain and known > 0
    with torch.no_grad():
        block.module.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert cached(graph, **ask)[2] == 0


def test_what_is_kept_of_prompts_is_bounded(block: CausalLM) -> None:
    block.materialize()
    prefixes = PrefixCache(limit=3 * PIECE * 2 * 2 * 2 * 8 * 4 * 2)
    with torch.no_grad():
        for start in range(8):
            read_prompt(block.module, [start + 3] * (2 * PIECE + 5), prefixes, ())
            assert 0 < prefixes.nbytes <= prefixes.limit
        assert read_prompt(block.module, [10] * (2 * PIECE + 5), prefixes, ())[2] == 2 * PIECE
        assert read_prompt(block.module, [3] * (2 * PIECE + 5), prefixes, ())[2] == 0


@pytest.mark.parametrize("extra", [{}, {"stop": ["e"]}, {"whole_sentences": True}])
def test_text_comes_in_pieces_that_add_up(block: CausalLM, extra: dict[str, Any]) -> None:
    # proves 01 T-14: `text` is streamable
    graph = graph_of(block)
    inputs = {"prompt": "Tell a story.", "params": {**LONG, "max_new_tokens": 60, **extra}}
    *pieces, last = graph.stream(inputs)
    assert last.final and last.outputs == graph.run(inputs)
    assert "".join(p.outputs["text"] for p in pieces) == last.outputs["text"]
    assert len(pieces) > 1 or extra


def test_a_stream_is_cancelled_at_once(block: CausalLM) -> None:
    graph, cancel = graph_of(block), threading.Event()
    inputs = {"prompt": "Tell a story.", "params": {**LONG, "max_new_tokens": 1500, "stop": ["no such text"]}}
    chunks = graph.stream(inputs, cancel=cancel)
    next(chunks)
    cancel.set()
    started = time.monotonic()
    with pytest.raises(AbortRun):
        for _ in chunks:
            pass
    assert time.monotonic() - started < 1


def test_a_batch_is_decoded_together_as_if_one_by_one(block: CausalLM, folder: Path) -> None:
    block.materialize()
    prompts = ["One.", "Tell a long story of the harbour town and the storm.", "Why?"]
    calls: list[int] = []
    block.module.register_forward_hook(lambda m, a, k, o: calls.append(len(k["input_ids"])), with_kwargs=True)
    params = {"temperature": 0, "repetition_penalty": 1.1, "max_new_tokens": 24}
    together = block.run({"prompt": prompts, "params": params})
    steps = sum(size > 1 for size in calls)
    assert 0 < steps <= 24 and max(calls) == 3
    one = CausalLM(checkpoint_ref=str(folder))
    assert together["text"] == [one.run({"prompt": p, "params": params})["text"] for p in prompts]
    schema = {"type": "array", "items": {"enum": ["storm", "ice"]}, "minItems": 2, "maxItems": 2}
    out = block.run({"prompt": prompts, "schema": schema, "params": {"seed": 3}})
    assert all(len(d) == 2 and set(d) <= {"storm", "ice"} for d in out["data"])
    assert out == block.run({"prompt": prompts, "schema": schema, "params": {"seed": 3}})


def test_runs_of_a_batch_are_decoded_together_as_if_one_by_one(block: CausalLM) -> None:
    """02 G-43: several inputs of one graph are one padded batch; each has its own seed and its own adapters."""
    graph = graph_of(block)
    adapter = LoRA(target="llm", modules=["*v_proj"], when={"graph_id": "g"})
    graph.add_node(adapter, "style")
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.fill_(0.05)
    schema = {"type": "object", "properties": {"n": {"enum": ["storm", "ice"]}}, "required": ["n"]}
    batch: list[dict[str, Any]] = [
        {"prompt": "One.", "system": SYSTEM, "params": {"max_new_tokens": 20, "seed": 1}},
        {"prompt": "Tell a long story of the harbour.", "params": {"max_new_tokens": 33, "seed": 2}},
        {"prompt": "Which?", "schema": schema, "params": {"seed": 3}},
        {"prompt": ["Two.", "Three."], "params": {"max_new_tokens": 9, "temperature": 0}},
    ]
    alone = [graph.run(inputs) for inputs in batch]
    calls: list[int] = []
    block.module.register_forward_hook(lambda m, a, k, o: calls.append(len(k["input_ids"])), with_kwargs=True)
    seen: list[int] = []
    assert graph.run_batch(batch, callbacks=(lambda e: e.kind == "model_call" and seen.append(1),)) == alone
    assert max(calls) == 5 and len(seen) == 5
    batch[1] = {"prompt": "word " * 3000}
    with pytest.raises(NodeExecutionError) as caught:
        graph.run_batch(batch)
    assert "in item 1 of the batch" in caught.value.__notes__


def test_int8_weights_are_a_model_of_their_own_that_cannot_learn(folder: Path, tmp_path: Path) -> None:
    pool = ModelPool()
    config = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(folder)}}
    small = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(folder), "weights": "int8"}}
    plain: Any = default_registry().build(config, pool=pool)
    block: Any = default_registry().build(small, pool=pool)
    assert block is not plain and block.model_ref() != plain.model_ref()
    block.materialize()
    plain.materialize()
    assert pool.nbytes == block.nbytes + plain.nbytes > 0 and block.nbytes < plain.nbytes
    prompt = block._prompt_ids([{"role": "user", "content": "The ferry waits for the tide and the bell."}])
    with torch.no_grad():
        ours, theirs = (read_prompt(b.module, prompt, None, ())[0] for b in (block, plain))
    assert 0 < (ours - theirs).abs().max() < 0.1 * theirs.std()
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"]}
    asked = {"prompt": "p", "schema": schema, "params": {"seed": 1}}
    answer = block.run(asked)["data"]
    assert 1 <= answer["n"] <= 9
    assert block.trainable_parameters() == [] and block.unfreeze().trainable_parameters() == []
    assert block.adapter_slots() == []
    with pytest.raises(AdapterError, match=r"int8.*leave weights out"):
        LoRA(target="x").attach(block)
    with pytest.raises(AdapterError, match="neither be trained"):
        block.answer_loss([{"messages": [{"role": "user", "content": "p"}], "answer": "a"}])
    block.save_checkpoint(tmp_path / "int8")
    other: Any = CausalLM(checkpoint_ref=str(folder), weights="int8")
    other.load_from_checkpoint(tmp_path / "int8")
    assert other.run(asked)["data"] == answer and not block.weights_changed() and other.weights_changed()
    with pytest.raises(ConfigError, match="weights is 'int8'"):
        CausalLM(checkpoint_ref="x", weights="int4")

"""How a local language model decodes: kept prefixes, pieces of text, batches, and weights of 8 bits."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import save_tiny_lm

from wg_blocks.decoding import PIECE, PrefixCache, ends_of_pieces, read_prompt
from wg_blocks.llm_local import CausalLM
from wg_blocks.lora import LoRA
from wg_blocks.packed import Packed, PackedLlama
from wg_blocks.reading import LlamaReader, Reader, reader_of
from wg_core import Graph, ModelPool
from wg_core.assembly.registry import default_registry
from wg_core.errors import AbortRun, AdapterError, ConfigError, NodeExecutionError
from wg_core.weights.lora import per_row

SYSTEM = "You write the chronicle of a small harbour town, calm and concrete. Numbers such as 0, 1, 2 are written out."
LONG = {"max_new_tokens": 40, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads that packed weights go with."""
    return save_tiny_lm(tmp_path_factory.mktemp("wide"), heads=2)


@pytest.fixture
def block(folder: Path) -> CausalLM:
    return CausalLM(checkpoint_ref=str(folder))


@pytest.fixture
def exact(folder: Path) -> CausalLM:
    """Where a batch and its rows are compared: rounding, which differs between them and between machines, decides no token."""
    return CausalLM(checkpoint_ref=str(folder), dtype="float64")


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
    chats: Any = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": t}] for t in ("The ice?", "Why?")]
    ids, other = (block._prompt_ids(chat) for chat in chats)
    shared = block._shared(chats[0], ids)
    same = next(i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
    assert shared == block._shared(chats[1], other) == same > PIECE
    prefixes, reader, reused = PrefixCache(), reader_of(block.module), reader_of(block.module)
    with torch.no_grad():
        plain, none = read_prompt(reader, ids, None, (), shared)
        _, first = read_prompt(reused, other, prefixes, (), shared)
        scores, known = read_prompt(reused, ids, prefixes, (), shared)
        assert (none, first, known) == (0, 0, shared)
        assert torch.equal(plain, scores)
        for ours, theirs in zip(reader.layers or [], reused.layers or [], strict=True):
            assert all(map(torch.equal, ours, theirs))
        assert read_prompt(reused, ids, prefixes, ("other weights",), shared)[1] == 0
        assert read_prompt(reused, ids, prefixes, (), 7)[1] == 0  # in other pieces it is another computation


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 300), shared=st.integers(0, 299))
def test_pieces_are_bounded_and_end_where_the_shared_begin_does(size: int, shared: int) -> None:
    shared = min(shared, size - 1)
    ends = ends_of_pieces(size, shared)
    assert ends[-1] == size and (not shared or shared in ends)
    assert all(0 < b - a <= PIECE for a, b in itertools.pairwise([0, *ends]))


def test_llama_is_read_as_by_its_own_forward_pass(block: CausalLM) -> None:
    """03 W-22: the shorter pass gives the model's own numbers, adapters included; what it cannot do is left to that."""
    block.materialize()
    model, ids = block.module, [7, 5, 9, 11, 5, 8, *range(3, 40)]
    graph = graph_of(block)
    adapter = LoRA(target="llm", modules=["*"])
    graph.add_node(adapter, "style")
    adapter.materialize()
    with torch.no_grad(), per_row([[adapter]]):
        for _, parameter in adapter.named_parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        ours, theirs = reader_of(model), Reader(model)
        assert type(ours) is LlamaReader
        for reader in (ours, theirs):
            reader.begin([])
        for piece in (ids[:20], ids[20:21], ids[21:]):
            mine, its = ours.read(piece), theirs.read(piece)
            assert torch.allclose(mine, its, atol=1e-4) and mine.std() > 0.01
        for mine, its in zip(ours.layers or [], theirs.layers or [], strict=True):
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, its, strict=True))
        adapted = ours.read([3])
        ours.begin(theirs.layers or [])
        with per_row([[]]):
            assert not torch.allclose(ours.read([3]), adapted, atol=1e-2)
        ours.begin(theirs.layers or [])
        long = [3] * 400  # more than there is room for at first
        assert torch.allclose(ours.read(long), theirs.read(long), atol=1e-4)
    for module in (model, model.model.layers[0].mlp, model.model.norm):
        handle = module.register_forward_hook(lambda *_: None)
        assert type(reader_of(model)) is Reader
        handle.remove()
    model.train()
    assert type(reader_of(model)) is Reader


@pytest.mark.parametrize("weights", [None, "int4"])
def test_stages_of_one_step_share_their_prefix(wide: Path, weights: str | None) -> None:
    graph = graph_of(CausalLM(checkpoint_ref=str(wide), weights=weights))
    ask = {"system": SYSTEM, "params": LONG}
    first = cached(graph, prompt="What of the ice?", **ask)
    second = cached(graph, prompt="Who keeps it?", **ask)
    again = cached(graph, prompt="Who keeps it?", **ask)
    assert first[2] == 0 < second[2] and again[1] - again[2] <= PIECE
    fresh = graph_of(CausalLM(checkpoint_ref=str(wide), weights=weights))
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
            read_prompt(reader_of(block.module), [start + 3] * (2 * PIECE + 5), prefixes, ())
            assert 0 < prefixes.nbytes <= prefixes.limit
        assert read_prompt(reader_of(block.module), [10] * (2 * PIECE + 5), prefixes, ())[1] == 2 * PIECE
        assert read_prompt(reader_of(block.module), [3] * (2 * PIECE + 5), prefixes, ())[1] == 0


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


def test_a_batch_is_decoded_together_as_if_one_by_one(exact: CausalLM, folder: Path) -> None:
    block = exact
    block.materialize()
    prompts = ["One.", "Tell a long story of the harbour town and the storm.", "Why?"]
    calls: list[int] = []
    block.module.register_forward_hook(lambda m, a, k, o: calls.append(len(k["input_ids"])), with_kwargs=True)
    params = {"temperature": 0, "repetition_penalty": 1.1, "max_new_tokens": 24}
    together = block.run({"prompt": prompts, "params": params})
    steps = sum(size > 1 for size in calls)
    assert 0 < steps <= 24 and max(calls) == 3
    one = CausalLM(checkpoint_ref=str(folder), dtype="float64")
    assert together["text"] == [one.run({"prompt": p, "params": params})["text"] for p in prompts]
    schema = {"type": "array", "items": {"enum": ["storm", "ice"]}, "minItems": 2, "maxItems": 2}
    out = block.run({"prompt": prompts, "schema": schema, "params": {"seed": 3}})
    assert all(len(d) == 2 and set(d) <= {"storm", "ice"} for d in out["data"])
    assert out["data"] == block.run({"prompt": prompts, "schema": schema, "params": {"seed": 3}})["data"]


def test_runs_of_a_batch_are_decoded_together_as_if_one_by_one(exact: CausalLM) -> None:
    """02 G-43: several inputs of one graph are one batch; each has its own seed and its own adapters."""
    block = exact
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
    read: list[int] = []
    hook = block.module.model.embed_tokens.register_forward_hook(lambda m, a, o: read.append(len(a[0])))
    assert graph.run_batch(batch) == alone and len(read) < 5 + 33 and 4 in read, read  # one pass for all
    hook.remove()
    calls: list[int] = []
    block.module.register_forward_hook(lambda m, a, k, o: calls.append(len(k["input_ids"])), with_kwargs=True)
    seen: list[int] = []
    assert graph.run_batch(batch, callbacks=(lambda e: e.kind == "model_call" and seen.append(1),)) == alone
    assert max(calls) == 5 and len(seen) == 5
    batch[1] = {"prompt": "word " * 3000}
    with pytest.raises(NodeExecutionError) as caught:
        graph.run_batch(batch)
    assert "in item 1 of the batch" in caught.value.__notes__


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.0, 1e-6, 1.0, 300.0]))
def test_packed_numbers_are_near_and_stay_what_they_are(bits: int, seed: int, size: float) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(seed)) * size
    packed = Packed(weight, bits)
    rows = packed.rows(torch.arange(6))
    half = packed.scale.repeat_interleave(32, 1) / 2
    assert ((rows - weight).abs() <= half * 1.001 + 1e-12).all()
    again = Packed(rows, bits)
    assert torch.equal(again.codes, packed.codes)
    assert torch.allclose(again.rows(torch.arange(6)), rows, rtol=1e-5, atol=size * 1e-6)


def unpacked(block: CausalLM, packed: Any) -> Any:
    """The model of `block` with the numbers of a packed one."""
    model = block.module
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(packed.head.rows(torch.arange(packed.head.outputs)))
        for layer, small in zip(model.model.layers, packed.layers, strict=True):
            at, mlp = layer.self_attn, layer.mlp
            parts = {small.qkv: (at.q_proj, at.k_proj, at.v_proj), small.o: (at.o_proj,), small.down: (mlp.down_proj,)}
            for weight, linears in (parts | {small.gate_up: (mlp.gate_proj, mlp.up_proj)}).items():
                rows = weight.rows(torch.arange(weight.outputs)).split([linear.out_features for linear in linears])
                for linear, given in zip(linears, rows, strict=True):
                    linear.weight.copy_(given)
    return model


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_packed_llama_reads_as_one_with_the_same_numbers(wide: Path, weights: str) -> None:
    """04 X-15: the only difference is that inputs of products are rounded to 8 bits."""
    small = CausalLM(checkpoint_ref=str(wide), weights=weights)
    theirs, ours = Reader(unpacked(CausalLM(checkpoint_ref=str(wide)), small.module)), small.module.reader()
    with torch.no_grad():
        for reader in (ours, theirs):
            reader.begin([])
        for piece in (list(range(3, 40)), [7], [5, 9, 11], [3] * 300):
            mine, its = ours.read(piece), theirs.read(piece)
            assert (mine - its).abs().max() < 0.05 * its.std()
        for mine, its in zip(ours.layers, theirs.layers or [], strict=True):
            assert all((a - b).abs().max() < 0.05 * b.std() for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_packed_weights_are_a_model_of_their_own_that_cannot_learn(wide: Path, tmp_path: Path, weights: str) -> None:
    pool = ModelPool()
    config = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(wide)}}
    packed = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(wide), "weights": weights}}
    plain: Any = default_registry().build(config, pool=pool)
    block: Any = default_registry().build(packed, pool=pool)
    assert block is not plain and block.model_ref() != plain.model_ref()
    block.materialize()
    plain.materialize()
    assert pool.nbytes == block.nbytes + plain.nbytes > 0
    assert sum(tensor.nbytes for tensor in block.module.state_dict().values()) < 0.4 * plain.nbytes
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"]}
    asked = {"prompt": "p", "schema": schema, "params": {"seed": 1}}
    answer = block.run(asked)["data"]
    assert 1 <= answer["n"] <= 9
    assert block.run({"prompt": ["p", "q"], "params": {"seed": 1}})["text"][0] == block.run({"prompt": "p", "params": {"seed": 1}})["text"]
    assert block.trainable_parameters() == [] and block.unfreeze().trainable_parameters() == []
    assert block.adapter_slots() == []
    with pytest.raises(AdapterError, match=rf"{weights}.*leave weights out"):
        LoRA(target="x").attach(block)
    with pytest.raises(AdapterError, match="neither be trained"):
        block.answer_loss([{"messages": [{"role": "user", "content": "p"}], "answer": "a"}])
    with pytest.raises(ConfigError, match="weights is 'int8', 'int4'"):
        CausalLM(checkpoint_ref="x", weights="int2")

    other: Any = CausalLM(checkpoint_ref=str(save_tiny_lm(tmp_path / "other", seed=4, heads=2)), weights=weights)
    told = {"prompt": "p", "params": {"seed": 1}}
    theirs = other.run(told)["text"]
    block.save_checkpoint(tmp_path / "kept")
    other.load_from_checkpoint(tmp_path / "kept")
    assert other.run(told)["text"] == block.run(told)["text"] != theirs
    assert not block.weights_changed() and other.weights_changed()


def test_what_cannot_be_packed_says_so(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match=r"int4 are for models of the class LlamaForCausalLM, not GPT2LMHeadModel"):
        PackedLlama(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=4)), 4)
    with pytest.raises(ConfigError, match=r"size 48, which is no multiple of 32; heads of size 24, .*; biases; hidden_act 'gelu'"):
        PackedLlama(LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, hidden_act="gelu")), 8)

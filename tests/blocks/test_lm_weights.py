"""The weights of a local language model: adapted, trained, saved and shared like those of any other block."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import save_tiny_lm

from wg_blocks.llm_local import CausalLM
from wg_blocks.lora import LoRA
from wg_core import Graph, ModelPool
from wg_core.assembly.registry import default_registry
from wg_core.errors import NodeExecutionError, PortValueError

GREEDY = {"temperature": 0, "max_new_tokens": 12, "repetition_penalty": 1.0}
ASK = {"prompt": "Who keeps the lamp?", "params": GREEDY}
EXAMPLES = [
    {"messages": [{"role": "user", "content": "Hi"}], "answer": "The old bell rings."},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}], "answer": "No."},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_lm(tmp_path / "tiny")


def learned(adapter: LoRA, scale: float = 0.5) -> LoRA:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * scale)
    return adapter


def test_the_loss_of_answers_is_that_of_their_tokens_and_the_end(folder: Path) -> None:
    block = CausalLM(checkpoint_ref=str(folder))
    loss, tokens = block.answer_loss(EXAMPLES)
    total, count = torch.zeros(()), 0
    for example in EXAMPLES:
        prompt = block._prompt_ids(example["messages"])
        answer = [*block.tokenizer(example["answer"]).input_ids, block.tokenizer.eos_token_id]
        logits = block.module(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        count += len(answer)
    assert tokens == count
    torch.testing.assert_close(loss, total / count)
    loss.backward()
    assert all(p.grad is not None for _, p in block.named_parameters())
    block.freeze()
    assert not block.answer_loss(EXAMPLES)[0].requires_grad
    block.module.config.max_position_embeddings = 8
    with pytest.raises(PortValueError, match="holds 8"):
        block.answer_loss(EXAMPLES)


def test_an_answer_that_was_learned_is_given(folder: Path) -> None:
    block = CausalLM(checkpoint_ref=str(folder)).train()
    examples = [{"messages": [{"role": "user", "content": ASK["prompt"]}], "answer": "The ferry waits."}]
    optimizer = torch.optim.AdamW(block.trainable_parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        block.answer_loss(examples)[0].backward()
        optimizer.step()
    assert block.eval().run(ASK)["text"] == "The ferry waits."


def test_an_adapter_works_in_answers_and_in_their_loss(folder: Path) -> None:
    # proves 01 A-13 on a language model
    graph = Graph("g")
    block, adapter = CausalLM(checkpoint_ref=str(folder)), LoRA(target="llm", modules=["*q_proj", "*v_proj"])
    graph.add_node(block, "llm")
    for name in ASK:
        graph.expose_input("llm", name, name)
    graph.expose_output("llm", "text", "text")
    plain, loss = graph.run(ASK)["text"], block.answer_loss(EXAMPLES)[0]
    graph.add_node(adapter, "style")
    assert graph.run(ASK)["text"] == plain
    learned(adapter)
    assert graph.run(ASK)["text"] != plain == block.run(ASK)["text"]  # beside the graph nothing has changed
    assert torch.equal(block.answer_loss(EXAMPLES)[0], loss)
    graph.remove_node("style")
    adapter.attach(block)
    block.freeze()
    adapted = block.answer_loss(EXAMPLES)[0]
    assert not torch.equal(adapted, loss)
    adapted.backward()
    assert all(p.grad is not None for p in adapter.trainable_parameters())
    assert {name.split(".")[-2] for name in adapter.state_dict()} == {"lora"} and not block.weights_changed()


def test_it_is_saved_whole_and_needs_its_reference_no_more(folder: Path, tmp_path: Path) -> None:
    # proves 01 F-21, 02 S-3
    graph = Graph("g")
    graph.add_node("llm/hf", "llm", config={"checkpoint_ref": str(folder)}, pool=ModelPool())
    block: Any = graph.nodes["llm"].child
    published = block.weight_hash()
    with torch.no_grad():
        block.module.model.layers[0].mlp.down_proj.weight.mul_(-3)
    assert block.weights_changed() and block.weight_hash() != published
    wanted = graph.run(ASK)["text"]
    graph.save(tmp_path / "saved")
    shutil.rmtree(folder)
    loaded = Graph.load(tmp_path / "saved", pool=ModelPool())
    other: Any = loaded.nodes["llm"].child
    assert loaded.run(ASK)["text"] == wanted and other.weight_hash() == block.weight_hash()
    assert other.module.lm_head.weight.data_ptr() == other.module.model.embed_tokens.weight.data_ptr()
    assert other._end_ids() == block._end_ids()
    with pytest.raises(NodeExecutionError, match="unknown model"):
        Graph.from_config(graph.to_config(), pool=ModelPool()).run(ASK)


def test_a_checkpoint_brings_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    block, plain = CausalLM(checkpoint_ref=str(folder)), save_tiny_lm(tmp_path / "plain", chat=False)
    CausalLM(checkpoint_ref=str(plain)).save_checkpoint(tmp_path / "checkpoint")
    block.load_from_checkpoint(tmp_path / "checkpoint")
    assert block.tokenizer.chat_template is None
    config = (folder / "config.json").read_bytes()
    other = CausalLM(checkpoint_ref=str(folder))
    state = other.state_dict()
    template = state["files.chat_template.jinja"].numpy().tobytes().replace(b"<|start|>", b"<|begin|>")
    state["files.chat_template.jinja"] = torch.frombuffer(bytearray(template), dtype=torch.uint8)
    assert bytes(state["files.config.json"].numpy()) == config
    other.load_state_dict(state)
    assert "<|begin|>" in other.tokenizer.chat_template


def test_one_reference_is_one_model_until_it_is_changed(folder: Path) -> None:
    # proves 01 F-37, E-2
    pool = ModelPool()
    config = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(folder)}}
    block: Any = default_registry().build(config, pool=pool)
    block.run(ASK)
    block.train().eval()
    assert default_registry().build(config, pool=pool) is block
    optimizer = torch.optim.SGD(block.trainable_parameters(), lr=0.1)
    block.answer_loss(EXAMPLES)[0].backward()
    optimizer.step()
    assert default_registry().build(config, pool=pool) is not block

"""Adapters on disk are PEFT's: plain PEFT reads ours, we read PEFT's, and the base is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from wg_blocks.llm_local import CausalLM
from wg_blocks.lora import LoRA
from wg_core.errors import AdapterError, CheckpointError, MissingModelError
from wg_core.levels.lora_world import lora_world
from worlds import AT, base_world, block_at, model, teach, texts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # PEFT asks transformers 5 so
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings"),  # adapted on purpose in one test
]
IDS = torch.tensor([[1, 5, 7, 9, 30, 2]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.getbasetemp() / "worlds"
    made.mkdir(exist_ok=True)
    return made


def shaken(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)


def logits(block: Any) -> torch.Tensor:
    with torch.no_grad():
        return block.modules["lm"](IDS).logits


def adapted(folder: Path, **settings: Any) -> tuple[Any, LoRA]:
    block, adapter = CausalLM(checkpoint_ref=str(model(folder))), LoRA(**settings)
    adapter.attach(block)
    return block, adapter


@pytest.mark.parametrize(
    "settings",
    [
        {"modules": ["all-linear"], "rank": 2, "alpha": 6},
        {"modules": ["*.0.*.q_proj", "lm.model.embed_tokens"], "rank": 3},
    ],
)
def test_plain_peft_gives_equal_logits(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """03 L-4: loaded by PEFT on the transformers model, without this project."""
    block, adapter = adapted(folder, **settings)
    plain = logits(block)
    shaken(p for _, p in adapter.named_parameters())
    adapter.save_adapter(tmp_path / "a")
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    base = AutoModelForCausalLM.from_pretrained(model(folder))
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, logits(block))
    assert not torch.allclose(logits(block), plain)
    said = json.loads((tmp_path / "a" / "base.json").read_bytes())
    assert said["weight_hash"] == block.weight_hash() and str(folder) not in json.dumps(said)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 12}},
    ],
)
def test_what_peft_made_is_loaded_here(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """03 L-4: also with ranks and factors that differ from layer to layer; it goes on learning here."""
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model(folder)), LoraConfig(task_type="CAUSAL_LM", **settings))
    shaken(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
    block, adapter = adapted(folder)
    adapter.load_adapter(tmp_path / "theirs")
    torch.testing.assert_close(logits(block), wanted)
    lazy, named = adapted(folder, checkpoint_ref=str(tmp_path / "theirs"))
    torch.testing.assert_close(logits(lazy), wanted)
    named.save_adapter(tmp_path / "ours")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model(folder)), str(tmp_path / "ours"))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, wanted)
    assert adapter.trainable_parameters() and all(p.requires_grad for p in adapter.trainable_parameters())


def test_what_does_not_fit_is_refused_and_nothing_changes(folder: Path, tmp_path: Path) -> None:
    """03 L-4: another base, more than a plain low-rank adapter, a changed file, none at all."""
    block, adapter = adapted(folder, modules=["all-linear"], rank=2)
    shaken(p for _, p in adapter.named_parameters())
    adapter.save_adapter(tmp_path / "a")
    before = logits(block)

    def spoiled(name: str, **change: Any) -> Path:
        path = tmp_path / "a" / name
        kept = path.read_bytes()
        path.write_text(json.dumps({**json.loads(kept), **change}))
        try:
            with pytest.raises(AdapterError) as found:
                adapter.load_adapter(tmp_path / "a")
        finally:
            path.write_bytes(kept)
        return Path(str(found.value))

    other = str(spoiled("base.json", weight_hash="f" * 64))
    assert "f" * 64 in other and str(block.weight_hash()) in other
    assert "use_dora" in str(spoiled("adapter_config.json", use_dora=True))
    assert "only LORA" in str(spoiled("adapter_config.json", peft_type="IA3"))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="does not match its hash"):
        adapter.load_adapter(tmp_path / "a")
    with pytest.raises(MissingModelError, match="there is no adapter_config"):
        adapter.load_adapter(tmp_path / "b")
    assert torch.equal(logits(block), before)


def test_the_sets_of_a_world_travel_in_one_folder(folder: Path, tmp_path: Path) -> None:
    """03 L-2, L-4: `SET/KEY/` each in PEFT's layout; another world on the same base takes them over."""
    base = base_world(folder, tmp_path / "snapshots")
    world = lora_world(base, "noir", rank=2, per_stage=True)
    teach(world, 1)
    world.save_adapters(tmp_path / "sets")
    world.save_adapters(tmp_path / "sets")
    keys = {f"{p.parent.parent.name}/{p.parent.name}" for p in (tmp_path / "sets").rglob("adapter_config.json")}
    assert keys == set(world.adapters())
    other = lora_world(base, "other", name="own", rank=3)
    other.load_adapters(tmp_path / "sets")
    assert other.active == ("own",) and texts(other) == texts(base)
    other.set_adapter("default")
    assert texts(other) == texts(world) != texts(base)
    digest = block_at(base, AT["tell"]).weight_hash()
    for path in (tmp_path / "sets").rglob("base.json"):
        path.write_text(path.read_text().replace(str(digest), "0" * 64))
    third = lora_world(base, "third", name="own")
    with pytest.raises(AdapterError, match="0" * 64):
        third.load_adapters(tmp_path / "sets")
    assert list(third.sets) == ["own"]
    with pytest.raises(AdapterError, match=r"holds no set .defaul.; did you mean"):
        third.load_adapters(tmp_path / "sets", ["defaul", "default"])
    with pytest.raises(AdapterError, match="holds no adapter sets"):
        third.load_adapters(tmp_path)

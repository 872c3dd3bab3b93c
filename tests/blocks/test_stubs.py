"""Identity blocks: one for each role, of the right types, passing through what the role means by that."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from wg_blocks.stubs import register_stubs
from wg_core import BlockRegistry, Graph
from wg_core.assembly.roles import KNOWN_ROLES, role_issues, role_of
from wg_core.errors import DuplicateBlockTypeError, MissingInputError, UnknownBlockTypeError

X = torch.linspace(0, 1, 48).reshape(1, 3, 4, 4)
ROLES = [
    "backbone",
    "solver",
    "codec",
    "conditioner",
    "tokenizer",
    "adapter",
    "guidance",
    "llm",
    "vlm",
    "embedding",
    "agent",
    "initializer",
]


@pytest.fixture
def stubs() -> BlockRegistry:
    registry = BlockRegistry()
    register_stubs(registry)
    return registry


def run(registry: BlockRegistry, role: str, **inputs: Any) -> dict[str, Any]:
    return registry.build({"block_type": f"{role}/identity"}).run(inputs, strict_types=True)


def test_each_role_has_one_with_its_ports(stubs: BlockRegistry) -> None:
    # proves 01 T-21
    register_stubs(stubs)
    assert stubs.list() == sorted(f"{r}/identity" for r in ROLES)
    for role in ROLES:
        block = stubs.build({"block_type": f"{role}/identity"})
        assert role_of(block) == role and role in KNOWN_ROLES and role_issues(block) == []
    with pytest.raises(UnknownBlockTypeError, match="did you mean 'codec/identity'"):
        stubs.build({"block_type": "codec/identiti"})
    with pytest.raises(DuplicateBlockTypeError):
        stubs.register("codec/identity", "wg_blocks.stubs:IdentityLLM")


def test_registering_and_building_loads_no_torch() -> None:
    code = (
        "import sys; from wg_core import BlockRegistry; from wg_blocks.stubs import register_stubs; r = BlockRegistry();"
        "register_stubs(r); [r.build({'block_type': t}) for t in r.list()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensors_pass_through(stubs: BlockRegistry) -> None:
    assert run(stubs, "backbone", latent=X, timestep=0.5)["pred"] is X
    assert run(stubs, "solver", latent=X, timestep=0.5, pred=X + 1) == {"next_latent": X, "next_timestep": 0.5}
    assert run(stubs, "codec", encode_image=X) == {"encode_latent": X}
    assert run(stubs, "codec", decode_latent=X, encode_image=X) == {"encode_latent": X, "decode_image": X}
    assert run(stubs, "guidance", pred_cond=X, pred_uncond=X + 1, scale=7)["pred_guided"] is X
    assert run(stubs, "adapter", condition=X)["adapted"] is X
    assert run(stubs, "conditioner", input=X)["embedding"] is X
    assert run(stubs, "initializer", init_latent=X) == {"latent": X, "timestep": 1.0}
    assert run(stubs, "initializer", shape=[1, 2, 3])["latent"].shape == (1, 2, 3)
    assert run(stubs, "initializer")["latent"].shape == (1, 4, 8, 8)
    with pytest.raises(MissingInputError, match="needs 'encode_image' or 'decode_latent'"):
        run(stubs, "codec")


def test_the_tokenizer_gives_whole_numbers_and_takes_them_back(stubs: BlockRegistry) -> None:
    found = run(stubs, "tokenizer", text=["Grüße", "x", ""])
    assert found["token_ids"].dtype is torch.int64 and found["token_ids"].shape == (3, 7)
    assert found["attention_mask"].sum(dim=1).tolist() == [7, 1, 0]
    assert run(stubs, "tokenizer", decode_token_ids=found["token_ids"])["decoded_text"] == ["Grüße", "x", ""]
    assert run(stubs, "conditioner", input=found["token_ids"])["embedding"].shape == (3, 7, 1)
    with pytest.raises(MissingInputError):
        run(stubs, "tokenizer")


def test_texts_are_echoed(stubs: BlockRegistry) -> None:
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
    assert run(stubs, "llm", prompt="hello") == {"text": "hello"}
    assert run(stubs, "llm", prompt=chat) == {"text": "hello"}
    assert run(stubs, "llm", prompt=["a", "b"]) == {"text": "a\nb"}
    assert run(stubs, "vlm", image=X, prompt="what") == {"text": "what"} and run(stubs, "vlm", image=X) == {"text": ""}
    assert run(stubs, "agent", context="hello") == {"response": "hello"}
    assert run(stubs, "agent", context={"a": 1}) == {"response": {"a": 1}}
    assert run(stubs, "embedding", input=["a", "bc"])["embedding"] == [[97 / 255], [98 / 255, 99 / 255]]
    assert run(stubs, "conditioner", input="ab")["embedding"].tolist() == [[[98.0], [99.0]]]


def test_a_whole_picture_task_runs_on_stubs_alone(stubs: BlockRegistry) -> None:
    # proves 01 A-14 (the blocks' part)
    graph = Graph("postcard")
    for node_id, role in (("tok", "tokenizer"), ("txt", "conditioner"), ("net", "backbone"), ("step", "solver"),
                          ("begin", "initializer"), ("picture", "codec")):  # fmt: skip
        defaults = {"shape": [1, 3, 8, 8]} if node_id == "begin" else None
        graph.add_node(f"{role}/identity", node_id, registry=stubs, defaults=defaults)
    graph.expose_input("tok", "text", "prompt")
    graph.expose_output("picture", "decode_image", "image")
    assert torch.equal(graph.run({"prompt": "a harbour"}, num_loop_steps=5)["image"], torch.zeros(1, 3, 8, 8))

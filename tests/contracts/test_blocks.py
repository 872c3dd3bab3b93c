"""Every registered block keeps the contract of all blocks; registering one tests it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wg_blocks.store import ModelStore
from wg_blocks.testing import ContractError, check_block_contract, sample_inputs
from wg_core import Block, BlockRegistry, Port, WorldContent, current_context
from wg_core.assembly.registry import default_registry
from wg_core.errors import MissingModelError

sys.path.insert(0, str(Path(__file__).parent.parent / "blocks"))
from tiny_bert import save_tiny_bert
from tiny_lm import save_tiny_lm


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("tiny_lm"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny_bert"))


def tensor(*shape: int) -> Any:
    import torch

    return torch.linspace(0, 1, torch.Size(shape).numel()).reshape(shape)


def ids(*rows: list[int]) -> Any:
    import torch

    return torch.tensor(rows)


# block type -> (config, inputs); a type that is not listed is built from an empty config and run with made-up inputs
Case = tuple[dict[str, Any], Callable[[], dict[str, Any]] | None]
GRAPH = {"kind": "graph", "id": "inner", "nodes": [{"node_id": "net", "block_type": "backbone/identity"}]}
GRAPH["exposed_inputs"] = [{"node_id": "net", "port_name": p, "name": p} for p in ("latent", "timestep")]
GRAPH["exposed_outputs"] = [{"node_id": "net", "port_name": "pred", "name": "pred"}]
RELIEF = {"map": {"block": {"block_type": "image/relief", "config": {"size": 128}}, "slot": "images"}}
REQUEST = {"id": "r1", "slot": "images", "maker": "map", "seed": 7}
REQUEST["params"] = {"land_share": 0.4, "ruggedness": 0.5, "form": "island", "place": "Lys"}
FAKE = {"provider": "fake", "model_id": "any"}
CASES: dict[str, Case] = {
    "text/template": ({"template": "In {{ place }}:\n{{ news }}", "optional": ["news"]}, None),
    "world/context": ({}, lambda: {"world": WorldContent.from_seed({}).view(), "query": "the harbour"}),
    "image/relief": ({"size": 128}, lambda: {"land_share": 0.4, "form": "island", "place": "Lys"}),
    "map/measure": ({}, lambda: {"artifacts": {"images": []}}),
    "describe/items": ({}, lambda: {"facts": [{"artifact_id": "a", "kind": "map"}], "texts": ["A map."]}),
    "graph/ref": ({"graph": GRAPH}, None),
    "maker/dispatch": ({"makers": RELIEF}, lambda: {"requests": [dict(REQUEST)]}),
    "llm/fake": ({}, lambda: {"prompt": "Who keeps the lamp?", "system": "Be short."}),
    "llm/api": (FAKE, lambda: {"prompt": "Who keeps the lamp?", "schema": {"type": "array", "items": {"type": "string"}}}),
    "llm/openai": (FAKE, lambda: {"prompt": [{"role": "user", "content": "Who?"}], "context": ["a", {"text": "b"}]}),
    "llm/anthropic": (FAKE, lambda: {"prompt": ["Who?", "Where?"], "system": "Be short.", "params": {"temperature": 0.1}}),
    "conditioner/vlm": (
        {"vlm": {"block_type": "vlm/api", "config": FAKE}, "embedding": {"block_type": "embedding/api", "config": FAKE}},
        lambda: {"input": tensor(2, 3, 4, 4), "prompt": "What is it?"},
    ),
    "vlm/api": (FAKE, lambda: {"image": tensor(2, 3, 4, 4), "prompt": ["What?", "And this?"]}),
    "embedding/api": ({**FAKE, "images": "object"}, lambda: {"input": ["one", "two", tensor(1, 3, 4, 4)]}),
    "speech/api": (FAKE, lambda: {"text": "The bell rings."}),
    "transcription/api": (FAKE, lambda: {"audio": {"waveform": tensor(1, 160), "sample_rate": 8000}}),
    "generator/api": ({**FAKE, "size": "8x4"}, lambda: {"prompt": "a pier", "image": tensor(1, 3, 4, 4)}),
    "pipeline/ref": ({"pipeline": {"id": "p", "nodes": [{"node_id": "inner", "config": GRAPH}], "exposed_inputs": [
        {"node_id": "inner", "port_name": p, "name": p} for p in ("latent", "timestep")
    ], "exposed_outputs": [{"node_id": "inner", "port_name": "pred", "name": "pred"}]}}, None),
    "agent/llm": ({"llm": {"block_type": "llm/fake"}, "memory": "run"}, lambda: {"context": "Who keeps the lamp?"}),
    "agent/api": ({**FAKE, "memory": "run"}, lambda: {"context": "Who keeps the lamp?"}),
    "agent/react": ({"llm": {"block_type": "llm/fake"}, "memory": "run"}, lambda: {"context": "Who keeps the lamp?"}),
    "tool/read_entity": ({}, lambda: {"world": WorldContent.from_seed({"characters": ["Ada"]}).view(), "id": "ada"}),
    "agent/scripted": ({"script": ["first", {"tool_calls": [{"tool_id": "t", "arguments": {}}]}]}, None),
    "adapter/lora": ({"target": "net", "rank": 2}, None),
    "projection/head": ({"width_in": 4, "width_out": 2, "hidden": 3}, lambda: {"tensor": tensor(2, 4)}),
    "backbone/toy": (
        {"condition_dim": 8},
        lambda: {"latent": tensor(2, 4, 8, 8), "timestep": 0.5, "condition": tensor(2, 3, 8),
                 "adapter_features": {"a:adapted": tensor(2, 4, 8, 8)}},
    ),
    "codec/toy": ({}, lambda: {"encode_image": tensor(1, 3, 8, 8), "decode_latent": tensor(1, 4, 4, 4)}),
    "conditioner/toy": ({}, lambda: {"input": ids([1, 2, 0]), "attention_mask": ids([1, 1, 0])}),
    "tokenizer/bytes": ({"max_length": 9}, lambda: {"text": ["Grüße, Welt", ""], "decode_token_ids": ids([73, 106])}),
    "tokenizer/identity": ({}, lambda: {"text": "ä", "decode_token_ids": ids([73, 106])}),
    "initializer/noise": ({"strength": 0.5}, lambda: {"init_latent": tensor(1, 4, 8, 8)}),
    "solver/heun": ({"num_steps": 3}, None),
    "tool/calc": ({}, lambda: {"expression": "2 ** 10 + sqrt(16)"}),
}  # fmt: skip


def case(block_type: str, request: pytest.FixtureRequest) -> Case:
    if block_type == "llm/hf":
        folder = str(request.getfixturevalue("tiny_lm"))
        return {"checkpoint_ref": folder}, lambda: {"prompt": "The harbour", "params": {"max_new_tokens": 4}}
    if block_type == "embedding/minilm":
        folder = str(request.getfixturevalue("tiny_bert"))
        return {"checkpoint_ref": folder}, lambda: {"input": ["the lamp", "a storm at night"]}
    if block_type == "image/terrain":
        try:
            ModelStore().path("terrain-consistency")
        except MissingModelError as missing:
            pytest.skip(f"runs with its published network only: {missing}")
        return {"checkpoint_ref": "terrain-consistency", "size": 128}, lambda: {"land_share": 0.5}
    return CASES.get(block_type, ({}, None))


@pytest.mark.parametrize("block_type", default_registry().list())
def test_a_registered_block_keeps_the_contract(block_type: str, request: pytest.FixtureRequest) -> None:
    # proves 01 E-11, A-1
    config, inputs = case(block_type, request)
    registry = default_registry()
    block = registry.build({"block_type": block_type, "config": config})
    assert block.config == {**block.config, **config}
    check_block_contract(block, inputs() if inputs else None, registry=registry)


# ---- the kit itself: each breach is found ------------------------------------------------------------------------------


class Good(Block):
    ports = (Port("x", "in", "list"), Port("more", "in", "number", optional=True), Port("y", "out", "list"))

    def __init__(self, *, times: int = 2) -> None:
        super().__init__()
        self.times = times

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * self.times}


class Mutates(Good):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["x"].append("more")
        return {"y": list(inputs["x"])}


class Undeclared(Good):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": [], "z": 1}


class WrongKind(Good):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": "a text"}


class Random(Good):
    made = 0

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        Random.made += 1
        return {"y": [Random.made]}


class Seeded(Good):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": [current_context().node_seed()]}


class NeedsOptional(Good):
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": [inputs["more"]]}


class Forgets(Good):
    def __init__(self, *, times: int = 2) -> None:
        super().__init__()
        self.count = 0

    def own_state_dict(self) -> dict[str, Any]:
        self.count += 1
        return {"count": self.count}

    def load_own_state_dict(self, state: Any) -> None:
        pass


class NoForward(Block):
    ports = (Port("y", "out", "list"),)


class HalfAgent(Good):
    agentic = True


@pytest.mark.parametrize("good", [Good, Seeded])
def test_a_good_unregistered_block_passes(good: type[Good]) -> None:
    check_block_contract(good(times=3))
    check_block_contract(good(), {"x": [1], "more": 2})


@pytest.mark.parametrize(
    ("bad", "inputs", "said"),
    [
        (Mutates, None, "changed its input 'x'"),
        (Undeclared, None, "undeclared 'z'"),
        (WrongKind, None, "takes list but got str"),
        (Random, None, "node_seed"),
        (NeedsOptional, {"x": [1], "more": 2}, "more"),
        (Forgets, None, "state"),
        (NoForward, None, "no forward"),
        (HalfAgent, None, "tool_results"),
    ],
)
def test_a_breach_is_found(bad: type[Block], inputs: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        check_block_contract(bad(), inputs, registry=BlockRegistry())
    assert bad.__name__ in str(caught.value) or not isinstance(caught.value, ContractError)


def test_inputs_are_made_from_types_and_schemas() -> None:
    class Wants(Block):
        ports = (
            Port("form", "in", "text", schema={"enum": ["island", "coast"]}),
            Port("level", "in", "number", schema={"minimum": 3}),
            Port("kind", "in", "text", default="map"),
            Port("seed", "in", "number", optional=True),
        )

    assert sample_inputs(Wants()) == {"form": "island", "level": 3}

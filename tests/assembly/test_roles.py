"""Roles and their contracts."""

from __future__ import annotations

import pytest

from wg_core import Block, Port
from wg_core.assembly import roles
from wg_core.assembly.roles import KNOWN_ROLES, register_role, role_issues, role_of
from wg_core.errors import ConfigError, DuplicateBlockTypeError

# The contract, by role: inputs and outputs with types, `?` optional, `*` aggregating (proves 01 T-6 to T-20).
CONTRACT = {
    "backbone": (
        "latent:tensor timestep:tensor|number condition?*concat:tensor|dict adapter_features?*dict:tensor|dict",
        "pred:tensor",
    ),
    "solver": (
        "latent:tensor timestep:tensor|number pred:tensor",
        "next_latent:tensor next_timestep:tensor|number",
    ),
    "codec": ("encode_image?:image|tensor decode_latent?:tensor", "encode_latent?:tensor decode_image?:image|tensor"),
    "conditioner": ("input:text|tensor|image|dict attention_mask?:tensor", "embedding:tensor|dict pooled?:tensor"),
    "tokenizer": (
        "text?:text decode_token_ids?:tensor",
        "token_ids?:tensor attention_mask?:tensor decoded_text?:text",
    ),
    "guidance": (
        "pred_cond:tensor pred_uncond?:tensor scale?:number|tensor condition?:tensor|dict",
        "pred_guided:tensor",
    ),
    "llm": (
        "prompt:text|list context?*concat:text|list|dict system?:text params?:dict",
        "text:text token_ids?:tensor usage?:dict",
    ),
    "vlm": ("image:image|ref|list prompt?:text system?:text params?:dict", "text:text data?:dict"),
    "embedding": ("input:text|image|list", "embedding:tensor|list"),
    "agent": ("context:text|list|dict tool_results?:list system?:text", "response?:text|dict tool_calls?:list"),
    "initializer": ("init_latent?:tensor seed?:number shape?:list", "latent:tensor timestep:tensor|number"),
    "position_embedder": ("indices:tensor", "embedding:tensor"),
    "pooler": ("sequence:tensor", "vector:tensor"),
    "projection": ("tensor:tensor", "tensor_out:tensor"),
    "loss": ("prediction:tensor target:tensor", "loss:tensor|number"),
    "generator": ("prompt:text image?:image|ref", "image_out:image|ref"),
    "adapter": ("", ""),
    "tool": ("", ""),
}


def written(ports: list[Port]) -> str:
    def one(port: Port) -> str:
        joins = f"*{port.aggregation}" if port.aggregation != "single" else ""
        return f"{port.name}{'?' if port.optional else ''}{joins}:{'|'.join(port.types)}"

    return " ".join(map(one, ports))


@pytest.mark.parametrize("role", CONTRACT)
def test_contract_of_each_role(role: str) -> None:
    contract = KNOWN_ROLES[role]
    ports = list(contract.ports)
    assert contract.role == role
    assert (
        written([p for p in ports if p.direction == "in"]),
        written([p for p in ports if p.direction == "out"]),
    ) == (CONTRACT[role])


def test_every_known_role_is_in_the_contract_above() -> None:
    assert set(KNOWN_ROLES) >= set(CONTRACT)


@pytest.mark.parametrize(
    ("contract", "alias", "port"),
    [
        (roles.Backbone, "x", "latent"),
        (roles.Backbone, "t", "timestep"),
        (roles.Backbone, "encoder_hidden_states", "condition"),
        (roles.Backbone, "noise", "pred"),
        (roles.Solver, "model_output", "pred"),
        (roles.Solver, "x_next", "next_latent"),
        (roles.Codec, "pixels", "encode_image"),
        (roles.Conditioner, "token_ids", "input"),
        (roles.Tokenizer, "input_ids", "token_ids"),
        (roles.SignalAdapter, "control", "condition"),
        (roles.SignalAdapter, "delta", "adapted"),
        (roles.LLM, "response", "text"),
        (roles.Agent, "prompt", "context"),
    ],
)
def test_aliases_name_canonical_ports(contract: type[Block], alias: str, port: str) -> None:
    assert contract().get_port(alias).name == port


def test_role_of_a_block_is_its_attribute_then_its_type_prefix() -> None:
    class Plain(Block):
        ports = (Port("x", "in"),)

    class Net(roles.Backbone):
        pass

    assert role_of(Net()) == "backbone"
    block = Plain()
    assert role_of(block) is None
    block.block_type = "solver/mine"
    assert role_of(block) == "solver"
    block.block_type = "picture/mine"
    assert role_of(block) is None
    net = Net()
    net.block_type = "solver/mine"
    assert role_of(net) == "backbone"  # the attribute is asked first
    assert role_of(object()) is None


def test_both_kinds_of_adapter_have_one_role() -> None:
    assert roles.SignalAdapter.role == roles.WeightAdapter.role == "adapter"
    assert not roles.WeightAdapter.ports


def test_agents_are_agentic_and_never_pooled() -> None:
    assert roles.Agent.agentic and not roles.Agent.poolable


def test_a_concrete_block_may_add_ports_and_narrow_types() -> None:
    class Net(roles.Backbone):
        ports = (*roles.Backbone.ports, Port("mask", "in", "tensor", optional=True))

    class Strict(Block):
        role = "solver"
        ports = (
            Port("latent", "in", "tensor"), Port("timestep", "in", "number"), Port("pred", "in", "tensor"),
            Port("next_latent", "out", "tensor"), Port("next_timestep", "out", "number"),
        )  # fmt: skip

    assert role_issues(Net()) == [] == role_issues(Strict())


def test_broken_contracts_are_told_in_words() -> None:
    class Renamed(Block):
        role = "pooler"
        ports = (Port("sequence", "in", "text"), Port("pooled", "out", "tensor", aliases=("vector",)))

    class Turned(Block):
        role = "pooler"
        ports = (Port("sequence", "out", "tensor"), Port("vector", "out", "tensor"))

    issues = role_issues(Renamed())
    assert len(issues) == 2
    assert "'sequence' is 'text'" in issues[0] and "'vector'" in issues[1] and "aliases" in issues[1]
    assert "'sequence' is an output" in role_issues(Turned())[0]


def test_a_new_role_needs_only_a_class_and_a_registration() -> None:  # proves 01 T-4
    class Sharpener(Block):
        ports = (Port("image", "in", "image"), Port("sharp", "out", "image"))

    assert register_role("sharpener_of_tests", Sharpener) is Sharpener
    register_role("sharpener_of_tests", Sharpener)
    try:
        block = Sharpener()
        assert role_of(block) == "sharpener_of_tests"
        with pytest.raises(DuplicateBlockTypeError, match="known already, as Sharpener"):

            class Other(Block):
                ports = ()

            register_role("sharpener_of_tests", Other)
    finally:
        del KNOWN_ROLES["sharpener_of_tests"]


@pytest.mark.parametrize(
    ("name", "contract", "message"),
    [
        ("Bad Name", roles.Pooler, "bad role name"),
        ("thing", object, "subclass of Block"),
        ("other_name", roles.Pooler, "has the role 'pooler'"),
    ],
)
def test_bad_roles_are_refused(name: str, contract: type[Block], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_role(name, contract)
    assert name not in KNOWN_ROLES

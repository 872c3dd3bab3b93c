"""The registry, plugins, canonical block configurations, secrets, templates."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from blocks_for_tests import Affine, Agent, Const, Echo, Model, Typed
from pydantic import BaseModel, ConfigDict, Field

from wg_core import Block, BlockRegistry, ConfigError, Graph, ModelPool, Port, register_block
from wg_core.assembly.registry import canonical
from wg_core.assembly.template import TemplateRegistry
from wg_core.errors import (
    DuplicateBlockTypeError,
    TemplateParameterError,
    UnknownBlockTypeError,
    UnknownTemplateError,
)


def test_register_get_list_and_contains(registry: BlockRegistry) -> None:
    """01 F-44."""
    assert registry.get("test/affine") is Affine
    assert "test/affine" in registry
    assert "test/nothing" not in registry
    assert set(registry.list("test")) == set(registry.list())
    assert registry.list("llm") == []
    assert registry.backends("test/affine") == ["local"]
    assert not registry.is_agentic("test/affine")


@pytest.mark.parametrize(
    ("block_type", "says"),
    [
        ("affine", "'affine' is not of the form role/name"),
        ("test.affine", "did you mean 'test/affine'?"),
        ("Test/Affine", "is not of the form role/name (lower case)"),
        ("test/a/b", "is not of the form"),
        ("test/affine\n", "is not of the form"),
    ],
)
def test_type_syntax(block_type: str, says: str) -> None:
    """01 F-45, A-2."""
    with pytest.raises(ConfigError) as caught:
        BlockRegistry().register(block_type, Affine)
    assert says in str(caught.value)


def test_a_taken_name_needs_override_and_the_same_again_is_nothing(registry: BlockRegistry) -> None:
    """01 F-44, A-2: DuplicateBlockTypeError names both factories and the way out."""
    registry.register("test/affine", Affine)
    with pytest.raises(
        DuplicateBlockTypeError,
        match=r"'test/affine' \(local\) is registered as Affine; pass override=True to replace it by Const",
    ):
        registry.register("test/affine", Const)
    assert registry.get("test/affine") is Affine
    registry.register("test/affine", Const, override=True)
    assert registry.get("test/affine") is Const


def test_dotted_factories_are_imported_at_first_use_and_may_be_registered_again() -> None:
    """01 F-44: identical re-registration is a no-op, also after the first use."""
    registry = BlockRegistry()
    for _ in range(2):
        registry.register("test/affine", "blocks_for_tests:Affine")
        assert registry.get("test/affine") is Affine
    with pytest.raises(DuplicateBlockTypeError, match="registered as blocks_for_tests:Affine"):
        registry.register("test/affine", "blocks_for_tests:Const")


@pytest.mark.parametrize("target", ["no_such_module:Block", "blocks_for_tests:NoSuchBlock"])
def test_a_factory_that_cannot_be_imported_is_named(target: str) -> None:
    """01 F-1, A-2: UnknownBlockTypeError with type and target."""
    registry = BlockRegistry()
    registry.register("test/broken", target)
    with pytest.raises(
        UnknownBlockTypeError, match=f"'test/broken' is registered as '{target}', which cannot be imported"
    ):
        registry.get("test/broken")


def test_unknown_types_and_backends_meet_near_spellings(registry: BlockRegistry) -> None:
    """01 F-32, F-47, A-2: UnknownBlockTypeError; printed without the quotes of KeyError; never a silent local load."""
    with pytest.raises(UnknownBlockTypeError) as caught:
        registry.build({"block_type": "test/afine"})
    assert str(caught.value).startswith("block type 'test/afine' is not registered; did you mean 'test/affine'")
    registry.register("test/affine", Const, backend="remote")
    with pytest.raises(UnknownBlockTypeError, match="'test/affine' has no backend 'onnx'; it has 'local', 'remote'"):
        registry.build({"block_type": "test/affine", "config": {"backend": "onnx"}})
    block = registry.build({"block_type": "test/affine", "config": {"backend": "remote", "value": 3}})
    assert isinstance(block, Const)
    assert block.to_config() == {"block_type": "test/affine", "config": {"value": 3, "backend": "remote"}}


def test_the_decorator_registers_a_class() -> None:
    """01 F-44, A-17: a third-party block works in building and configuration."""
    registry = BlockRegistry()

    @register_block("test/decorated", registry=registry)
    class Decorated(Echo):
        """A block."""

    graph = Graph("g")
    graph.add_node(Decorated, "a", registry=registry)
    assert graph.to_config()["nodes"] == [{"node_id": "a", "block_type": "test/decorated"}]
    with pytest.raises(UnknownBlockTypeError, match="class Echo is not registered; decorate it with @register_block"):
        graph.add_node(Echo, "b", registry=registry)


# ---- canonical configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"block_type": "t/a", "config": {"k": 1}},
        {"type": "t/a", "config": {"k": 1}},
        {"block_type": "t/a", "type": "t/a", "config": {"k": 1}},
        {"block_type": "t/a", "k": 1},
        {"type": "t/a", "k": 1},
    ],
)
def test_written_forms(config: dict[str, Any]) -> None:
    """01 F-46: canonical, synonym and flat form; the input is not changed."""
    before = {**config}
    assert canonical(config) == ("t/a", None, {"k": 1})
    assert config == before


def test_a_type_inside_config_belongs_to_the_block() -> None:
    """01 F-46, A-1: nested `type` keys survive."""
    assert canonical({"block_type": "t/a", "config": {"type": "x"}}) == ("t/a", None, {"type": "x"})
    assert canonical({"block_type": "t/a", "type": "x"}) == ("t/a", None, {"type": "x"})
    assert canonical({"block_type": "t/a", "block_id": "b1", "config": None}) == ("t/a", "b1", {})


def test_the_inner_config_is_a_copy() -> None:
    """01 F-46: inputs are not modified, not even by the block later."""
    inner = {"a": [1]}
    canonical({"block_type": "t/a", "config": inner})[2]["a"].append(2)
    assert inner == {"a": [1]}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"config": {}}, "a block needs block_type: role/name; got keys ['config']"),
        ({}, "a block needs block_type: role/name"),
        ({"block_type": "t/a", "type": "t/b", "config": {}}, "block_type 't/a' and type 't/b' differ; give one"),
        (
            {"block_type": "t/a", "config": {}, "k": 1},
            "block 't/a': unknown keys ['k'] beside 'config'; put them inside it",
        ),
        ({"block_type": "t/a", "config": [1]}, "block 't/a': config is a mapping, not list"),
        ({"block_type": "t/a", "config": {"k": object()}}, "block 't/a': its config is not plain JSON data"),
        ({"block_type": "t/a", "config": {"k": float("nan")}}, "block 't/a': its config is not plain JSON data"),
        ("t/a", "a block is described by a mapping, not str"),
    ],
)
def test_wrong_forms_are_named(config: Any, says: str) -> None:
    """01 F-46, F-14, A-2: ConfigError."""
    with pytest.raises(ConfigError) as caught:
        canonical(config)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"api_key": "sk-1"}, {"apiKey": "sk-1"}, {"token": "x"}, {"hf_token": "x"}, {"password": "x"}, {"db": {"password": "x"}},
        {"list": [{"client_secret": "x"}]}, {"credentials": "x"}, {"Authorization": "x"}, {"headers": {"x-api-key": "x"}},
        {"header": "Bearer sk-1-0123456789abcdef"}, {"any": "sk-1-0123456789abcdefghij"}, {"list": ["sk-1-0123456789abcdefghij"]},
        {"url": "https://me:sk-1@host/v1"}, {"url": "https://host/v1?api-key=sk-1"},
    ],
)  # fmt: skip
def test_literal_secrets_are_refused_without_being_shown(config: dict[str, Any]) -> None:
    """01 F-33, A-7."""
    with pytest.raises(
        ConfigError, match="looks like a secret; secrets stay in the environment, name the variable"
    ) as caught:
        canonical({"block_type": "t/a", "config": config})
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"api_key_env": "OPENAI_API_KEY"}, {"max_tokens": 5}, {"tokenizer": "x"}, {"token": None}, {"secret_door": "x"},
        {"text": "The bearer of a long message: see https://host/a?page=2 and mail me@host"}, {"url": "https://host:80/v1"},
    ],
)  # fmt: skip
def test_names_of_variables_and_innocent_keys_are_not(config: dict[str, Any]) -> None:
    """01 F-33."""
    assert canonical({"block_type": "t/a", "config": config})[2] == config


def test_arguments_of_a_block_are_checked_by_name(registry: BlockRegistry) -> None:
    """01 F-15, A-2: unknown and missing keys."""
    with pytest.raises(ConfigError, match="block 'test/affine': unknown config key 'scael'; did you mean 'scale'"):
        registry.build({"block_type": "test/affine", "config": {"scael": 1}})
    with pytest.raises(ConfigError, match="block 'test/returns': config key 'returned' is missing"):
        registry.build({"block_type": "test/returns"})


@pytest.mark.parametrize("size", [None, "x", [1]])
def test_what_a_block_makes_of_a_wrong_type_is_a_named_error(size: Any) -> None:
    """01 F-15: a constructor that does not look at its arguments still fails as a ConfigError, with the cause kept."""

    class Grown(Block):
        ports = (Port("y", "out"),)

        def __init__(self, *, size: int) -> None:
            super().__init__()
            self.grown = abs(size)

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"y": self.grown}

    registry = BlockRegistry()
    registry.register("test/grown", Grown)
    with pytest.raises(ConfigError, match=r"block 'test/grown': its config was refused \(TypeError: ") as caught:
        registry.build({"block_type": "test/grown", "config": {"size": size}})
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_config_model_names_the_field() -> None:
    """01 F-15: pydantic, extras forbidden; build errors report the field path."""

    class Wanted(BaseModel):
        model_config = ConfigDict(extra="forbid")
        size: int = Field(ge=1)

    class Sized(Block):
        ports = (Port("y", "out"),)
        config_model = Wanted

        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"y": self.config["size"]}

    registry = BlockRegistry()
    registry.register("test/sized", Sized)
    assert registry.build({"block_type": "test/sized", "size": 3}).run({}) == {"y": 3}
    with pytest.raises(ConfigError, match=r"block 'test/sized': config\.size: "):
        registry.build({"block_type": "test/sized", "size": 0})


def test_a_factory_may_build_sub_blocks_through_registry_and_pool(registry: BlockRegistry, pool: ModelPool) -> None:
    """01 F-46, F-38, A-11: two agents, one model."""
    llm = {"block_type": "test/model", "config": {"model_id": "m", "provider": "fake"}}
    one, two = (registry.build({"block_type": "test/agent", "config": {"llm": llm}}, pool=pool) for _ in range(2))
    assert isinstance(one, Agent)
    assert isinstance(two, Agent)
    assert one is not two
    assert one.llm is two.llm
    assert one.to_config() == {"block_type": "test/agent", "config": {"llm": llm}}


def test_config_is_captured_from_plain_arguments(registry: BlockRegistry) -> None:
    """01 F-14, A-1: a deep copy; positional ones too; what is not JSON raises."""
    assert Affine(scale=2).config == {"scale": 2}
    block = registry.build({"block_type": "test/typed", "config": {"takes": "text"}})
    assert registry.build(block.to_config()).to_config() == block.to_config()
    with pytest.raises(ConfigError, match="block 'Const': its config is not plain JSON data"):
        _ = Const(value=object()).config
    with pytest.raises(
        ConfigError, match="block of class Typed has no registered type; register it with @register_block"
    ):
        Typed().to_config()


# ---- plugins -------------------------------------------------------------------------------------------------------------


def install(folder: Path, name: str, module: str, group: str = "wg.blocks") -> None:
    """A package as pip would leave it: a module and its metadata with an entry point."""
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}:register\n")


GOOD = """
from typing import Any
from wg_core import Block, Port

class Shout(Block):
    ports = (Port("x", "in", "text"), Port("y", "out", "text"))
    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"].upper()}

def register(registry):
    registry.register("third/shout", "wg_test_good:Shout")
"""


@pytest.fixture
def packages(tmp_path: Path) -> Any:
    """A folder on `sys.path` for packages."""
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))


def test_an_installed_package_brings_blocks_and_a_broken_one_is_reported(
    packages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """01 F-47, A-17: discovery by entry points; one broken plugin is reported, not fatal."""
    install(packages, "wg_test_good", GOOD)
    install(packages, "wg_test_broken", "raise RuntimeError('half installed')\n")
    registry = BlockRegistry(plugins=True)
    with caplog.at_level(logging.WARNING, "wg_core.registry"):
        assert "third/shout" in registry.list("third")
    assert registry.broken_plugins == {"wg_test_broken": "RuntimeError: half installed"}
    assert "plugin 'wg_test_broken' of wg_test_broken:register is broken and left out: half installed" in caplog.text
    graph = Graph("g")
    graph.add_node("third/shout", "a", registry=registry)
    assert graph.run({"x": "hi"}) == {"y": "HI"}
    assert Graph.from_config(graph.to_config(), registry=registry).run({"x": "hi"}) == {"y": "HI"}
    with pytest.raises(UnknownBlockTypeError, match=r"broken plugins: .*half installed"):
        registry.get("third/whisper")


TEMPLATE = """
def register(templates):
    templates.register("graph", "third", third)

def third(name, scale=2):
    return {"kind": "graph", "id": name, "nodes": [{"node_id": "a", "block_type": "test/affine", "config": {"scale": scale}}]}
"""


def test_templates_of_packages_and_a_broken_one(packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    """01 F-47, 02 G-52."""
    install(packages, "wg_test_templates", TEMPLATE, "wg.templates")
    install(packages, "wg_test_no_templates", "def register(templates):\n    raise KeyError('gone')\n", "wg.templates")
    templates = TemplateRegistry(plugins=True)
    with caplog.at_level(logging.WARNING, "wg_core.templates"):
        assert templates.list("graph")["third"]["scale"] == 2
    assert list(templates.broken_plugins) == ["wg_test_no_templates"]


def test_templates_name_what_is_wrong() -> None:
    """02 G-52, 01 A-2: UnknownTemplateError, TemplateParameterError, DuplicateBlockTypeError."""

    def build(size: int, style: str = "plain") -> dict[str, Any]:
        return {"size": size, "style": style}

    templates = TemplateRegistry()
    templates.register("graph", "painter", build)
    templates.register("graph", "painter", build)
    assert templates.build("graph", "painter", {"size": 3}) == {"size": 3, "style": "plain"}
    with pytest.raises(UnknownTemplateError, match="no graph template 'paintr'; did you mean 'painter'"):
        templates.build("graph", "paintr", {})
    with pytest.raises(UnknownTemplateError, match="no world template 'painter'; there are none"):
        templates.build("world", "painter", {})
    with pytest.raises(
        TemplateParameterError, match="template 'painter' has no parameter 'sytle'; did you mean 'style'"
    ):
        templates.build("graph", "painter", {"size": 1, "sytle": "x"})
    with pytest.raises(TemplateParameterError, match="template 'painter' needs 'size'"):
        templates.build("graph", "painter", {})
    with pytest.raises(DuplicateBlockTypeError, match="there is a graph template 'painter' already"):
        templates.register("graph", "painter", lambda: {})
    assert templates.list("graph")["painter"]["style"] == "plain"


def test_models_may_be_given_by_position_too() -> None:
    """01 F-36: identity does not depend on how an argument was passed."""

    class Positional(Block):
        ports = (Port("y", "out"),)

        def __init__(self, checkpoint_ref: str) -> None:
            super().__init__()

    assert Positional("m").model_ref() == Positional(checkpoint_ref="m").model_ref() is not None
    assert Model(checkpoint_ref="m").model_ref() is not None
    assert Affine().model_ref() is None

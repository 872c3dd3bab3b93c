"""The doors of every level to configuration, state and training, written once."""

from __future__ import annotations

import inspect
import json
import secrets
import shutil
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import yaml

from wg_core.assembly.build import Build, checked_entry, open_document, parse_document
from wg_core.assembly.contract import contract_hash
from wg_core.assembly.loader import Document, Dumper
from wg_core.assembly.models import SCHEMA_VERSION
from wg_core.assembly.pool import ModelPool, default_pool
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.assembly.roles import WeightAdapter
from wg_core.assembly.template import default_templates
from wg_core.errors import CheckpointError, NodeError, StateDictError
from wg_core.execution.block import Block, LoadReport, take_over
from wg_core.execution.context import FRAME, Frame, RunOptions
from wg_core.execution.drive import Held, held
from wg_core.execution.executable_graph import Child, ExecutableGraph, Node
from wg_core.state.canonical import sha256_json
from wg_core.state.files import TEMP_PREFIX, make_folder, write_file
from wg_core.structure.ids import safe_path
from wg_core.weights.checkpoint import INDEX, file_hash, load_checkpoint, open_folder, put_folder, save_checkpoint
from wg_core.weights.lora import active
from wg_core.weights.module import ModuleBlock, frozen_forward
from wg_core.weights.tree import sub_paths, unique

if TYPE_CHECKING:
    from wg_core.levels.remote import Remote

MANIFEST = "manifest.json"
_CHECKPOINTS = {"dir": "checkpoint", "archive": "checkpoint.zip"}


def dump_yaml(config: Mapping[str, Any], path: Path | str) -> Path:
    """Write plain data as YAML, in order, readable."""
    target = Path(path)
    text = yaml.dump(dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    target.write_text(text, encoding="utf-8")
    return target


class Written:
    """What can be written down: the doors from and to configuration, for every level."""

    kind: ClassVar[str] = "graph"

    @classmethod
    @abstractmethod
    def from_entry(cls, entry: Any, build: Build) -> Self:
        """Build from a checked entry. Raises: ConfigError with file, line and path."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """This level as plain data, enough to build it again. Raises: ConfigError for an unregistered block."""

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, registry: BlockRegistry | None = None, pool: ModelPool | None = None
    ) -> Self:
        """Build from plain data and validate. Raises: ConfigError."""
        return cls._from_document(Document({"kind": cls.kind, **config}, f"<{cls.kind}>"), registry, pool)

    @classmethod
    def from_yaml(
        cls, path: Path | str, *, registry: BlockRegistry | None = None, pool: ModelPool | None = None
    ) -> Self:
        """Build from a YAML or JSON file, with its refs, and validate. Raises: FileNotFoundError, ConfigError."""
        return cls._from_document(open_document(path)[1], registry, pool)

    @classmethod
    def from_yaml_text(cls, text: str, *, registry: BlockRegistry | None = None, pool: ModelPool | None = None) -> Self:
        """Build from YAML or JSON text, which may not refer to files. Raises: ConfigError."""
        return cls._from_document(parse_document(text)[1], registry, pool)

    @classmethod
    def from_template(
        cls, name: str, *, registry: BlockRegistry | None = None, pool: ModelPool | None = None, **parameters: Any
    ) -> Self:
        """Build from a registered template. Raises: UnknownTemplateError, TemplateParameterError, ConfigError."""
        config = default_templates().build(cls.kind, name, parameters)
        return cls._from_document(Document(config, f"<template {name}>"), registry, pool)

    @classmethod
    def _from_document(cls, document: Document, registry: BlockRegistry | None, pool: ModelPool | None) -> Self:
        build = Build(registry or default_registry(), default_pool() if pool is None else pool, {}, document)
        return cls.from_entry(checked_entry(document, cls.kind), build)

    def hashed(self) -> dict[str, Any]:
        """What decides how this level runs, as plain data; children that are levels stand in it as their hashes."""
        return self.to_config()

    @property
    def config_hash(self) -> str:
        """Hash of everything that decides how this level runs, wherever its children run."""
        return sha256_json(self.hashed())

    def save_config(self, path: Path | str) -> Path:
        """Write `to_config()` as YAML."""
        return dump_yaml(self.to_config(), path)

    # ---- weights -----------------------------------------------------------------------------------------------------

    def block_paths(self) -> Iterator[tuple[str, Block]]:
        """Each use of a block below, sub-blocks included, as `(path, block)`."""
        return iter(())

    def save_checkpoint(self, path: Path | str, *, format: str = "dir", backend: str = "safetensors") -> Path:
        """Write the state of all blocks below, each once, as a folder (`dir`) or one file (`archive`).

        Raises: CheckpointError.
        """
        return save_checkpoint(self.block_paths(), path, kind=self.kind, format=format, backend=backend)

    def load_from_checkpoint(
        self, path: Path | str, *, strict: bool = True, rename: Mapping[str, str] | None = None, verify: bool = True
    ) -> LoadReport:
        """Load what `save_checkpoint` wrote into the blocks below; nothing changes if it raises.

        `rename` maps node paths in the checkpoint to those here. Raises: FileNotFoundError, CheckpointError,
        StateDictError.
        """
        return load_checkpoint(self.block_paths(), path, strict=strict, rename=rename, verify=verify)

    def save(self, folder: Path | str, *, format: str = "dir", backend: str = "safetensors") -> Path:
        """Write structure and weights to `folder`: `config.yaml`, the checkpoint, and a manifest with their hashes.

        Raises: ConfigError for an unregistered block, CheckpointError.
        """
        if format not in _CHECKPOINTS:
            raise CheckpointError(f"checkpoint format {format!r} is none of {', '.join(_CHECKPOINTS)}")
        target = Path(folder)
        make_folder(target.parent)
        temp = target.parent / f"{TEMP_PREFIX}{secrets.token_hex(6)}"
        try:
            make_folder(temp)
            config = self.save_config(temp / "config.yaml")
            checkpoint = self.save_checkpoint(temp / _CHECKPOINTS[format], format=format, backend=backend)
            hashed = checkpoint / INDEX if format == "dir" else checkpoint
            manifest = {
                "kind": self.kind,
                "schema_version": SCHEMA_VERSION,
                "config": {"file": config.name, "sha256": file_hash(config)},
                "checkpoint": {"file": checkpoint.name, "sha256": file_hash(hashed)},
            }
            write_file(temp / MANIFEST, json.dumps(manifest, indent=1).encode("utf-8"))
            put_folder(temp, target, MANIFEST)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return target

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        registry: BlockRegistry | None = None,
        pool: ModelPool | None = None,
        verify: bool = True,
    ) -> Self:
        """Build what `save` wrote, with its weights; the references that it was built from need not exist any more.

        Blocks come from a pool of its own unless one is given, so that no other user of a model is touched.

        Raises: FileNotFoundError, CheckpointError, ConfigError.
        """
        with open_folder(Path(folder), MANIFEST) as root:
            manifest = json.loads((root / MANIFEST).read_bytes())
            if manifest.get("kind") != cls.kind:
                raise CheckpointError(f"{folder} holds a {manifest.get('kind')}, not a {cls.kind}")
            config, checkpoint = (safe_path(root, manifest[part]["file"]) for part in ("config", "checkpoint"))
            checked = ((config, "config"), (checkpoint / INDEX if checkpoint.is_dir() else checkpoint, "checkpoint"))
            for path, part in checked if verify else ():
                if not path.is_file() or file_hash(path) != manifest[part]["sha256"]:
                    raise CheckpointError(f"{folder}: {path.name} does not match its hash; it was changed or cut off")
            built = cls.from_yaml(config, registry=registry, pool=ModelPool() if pool is None else pool)
            built.load_from_checkpoint(checkpoint, verify=verify)
            return built


class Level(Written, ExecutableGraph[Child]):
    """An executable graph that can be written down, loaded and trained."""

    def contract_hash(self) -> str:
        """Hash of the external ports: what may stand in for this level has the same."""
        return contract_hash(self)

    def remotes(self) -> Iterator[Remote]:
        """The parts of this level, at any depth, that run elsewhere."""
        return iter(())

    _adapted = False  # whether a weight adapter was ever added

    # ---- state and training ----------------------------------------------------------------------------------------

    def call_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What runs a child; in training, a child that is not trainable here runs with its weights held still."""
        child = cast("Block | Level[Any]", node.child)
        if isinstance(child, Level):
            return self._level_call(node, child)
        if any(isinstance(b, ModuleBlock) for b in child.iter_blocks()):
            return _module_call(cast(Any, node), self._adapters_of(child))
        return child.forward

    def _level_call(self, node: Node[Child], child: Level[Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def call(inputs: dict[str, Any]) -> dict[str, Any]:
            frame = FRAME.get()
            return child._execute(inputs, self.options_below(node, frame), frame) if frame else child.run(inputs)

        return call

    def options_below(self, node: Node[Child], frame: Frame) -> RunOptions:
        """The options of a level in `node`; what is not trainable here runs as outside training."""
        options = super().options_below(node, frame)
        return replace(options, training=False) if options.training and not node.trainable else options

    def stream_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], Generator[dict[str, Any], None, dict[str, Any]]]:
        """What gives the pieces of a block's outputs, with the adapters that work on it here."""
        block = cast(Block, node.child)
        adapters = self._adapters_of(block)
        if not adapters:
            return block.stream_forward
        return lambda inputs: held(block.stream_forward(inputs), lambda: active(adapters))

    def _adapters_of(self, child: Any) -> frozenset[int]:
        return frozenset(id(a) for a, t in self._hanging() if t is child)

    def insert_node(self, child: Child, node_id: str, **more: Any) -> str:
        """Add a ready child under `node_id`; a weight adapter hangs on to its target as soon as both are there.

        Raises: NodeError for a taken id or a default of an unknown port, ConfigError, AdapterError.
        """
        version = self.version
        super().insert_node(child, node_id, **more)
        self._adapted = self._adapted or isinstance(child, WeightAdapter)
        try:
            self._attach()
        except BaseException:
            super().remove_node(node_id)
            self.version = version
            raise
        return node_id

    def remove_node(self, node_id: str) -> None:
        """Remove a node with its edges and exposed ports; adapters let go of it."""
        child = self.get_node(node_id).child
        super().remove_node(node_id)
        if isinstance(child, WeightAdapter):
            child.detach()
        self._attach()

    def replace_block(self, node_id: str, child: Child) -> None:
        """Put another child with the same ports into a node; adapters move on to it.

        Raises: NodeError if a port that is in use is missing or of another direction or type, AdapterError.
        """
        super().replace_block(node_id, child)
        self._attach()

    def rename_node(self, node_id: str, new_id: str) -> None:
        """Give a node another id; edges, exposed ports and place in the order stay.

        Raises: NodeError for a taken id, and for the target of an adapter, which is part of its configuration.
        """
        for name, node in self.nodes.items() if self._adapted else ():
            if isinstance(node.child, WeightAdapter) and node.child.target == node_id:
                raise NodeError(f"{self.id}/{node_id} is the target of adapter {name!r}; remove that node to rename this one")
        super().rename_node(node_id, new_id)

    def _hanging(self) -> Iterator[tuple[WeightAdapter, Any]]:
        """Each weight adapter here with the block of its target, or None."""
        for node in self.nodes.values() if self._adapted else ():
            if isinstance(node.child, WeightAdapter):
                target = self.nodes.get(node.child.target)
                yield node.child, target.child if target is not None else None

    def _attach(self) -> None:
        for adapter, target in self._hanging():
            if target is None:
                adapter.detach()
            else:
                adapter.attach(target, managed=True)

    def block_paths(self) -> Iterator[tuple[str, Block]]:
        for node_id, node in self.nodes.items():
            child = cast("Block | Level[Any]", node.child)
            if isinstance(child, Level):
                for path, block in child.block_paths():
                    yield f"{node_id}/{path}", block
            else:
                yield from sub_paths(node_id, child)

    def keyed_blocks(self) -> dict[str, Block]:
        """Each block below once, sub-blocks included, under the path of its first use."""
        return unique(self.block_paths())

    def state_dict(self) -> dict[str, Any]:
        """State of all unique blocks below, as `"<path of first use>:<key>" -> tensor or JSON value`."""
        return {
            f"{path}:{k}": v for path, block in self.keyed_blocks().items() for k, v in block.own_state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Load what `state_dict` gave; nothing changes if it raises.

        Raises: StateDictError for missing or unexpected keys (with `strict`) and wrong shapes.
        """
        current = self.state_dict()
        missing = tuple(k for k in current if k not in state)
        unexpected = tuple(k for k in state if k not in current)
        wrong = [
            k for k in current if k in state and getattr(current[k], "shape", None) != getattr(state[k], "shape", None)
        ]
        if wrong or (strict and (missing or unexpected)):
            raise StateDictError(
                f"{self.id} cannot load this state: missing {list(missing)}, unexpected {list(unexpected)}, wrong shape {wrong}"
            )
        owned = [(path, block, block.own_state_dict()) for path, block in self.keyed_blocks().items()]
        take_over([(block, {k: state.get(f"{path}:{k}", v) for k, v in own.items()}) for path, block, own in owned if own])
        return LoadReport(missing, unexpected)

    def set_trainable(self, path: str, trainable: bool = True, *, freeze_others: bool = False) -> None:
        """Choose whether the node at `a/b/c` (or `a.b.c`) takes part in training.

        Raises: NodeError for an unknown path.
        """
        first, _, rest = path.replace(".", "/").partition("/")
        node = self.get_node(first)
        if rest and not isinstance(node.child, Level):
            raise NodeError(f"{self.id}/{first} is a block; there is no node {rest!r} below it")
        if rest:
            cast("Level[Any]", node.child).set_trainable(rest, trainable, freeze_others=freeze_others)
        if freeze_others:
            for other in self.nodes.values():
                other.trainable = other is node
        if not rest or trainable:
            node.trainable = trainable

    def trainable_parameters(self) -> list[Any]:
        """Parameters of all trainable nodes below, each tensor once."""
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def named_trainable_parameters(self) -> Iterator[tuple[str, Any]]:
        """`(path:name, parameter)` of all trainable nodes below, each tensor once."""
        seen: set[int] = set()
        for node_id, node in self.nodes.items():
            if not node.trainable:
                continue
            child = cast("Block | Level[Any]", node.child)
            separator = "/" if isinstance(child, Level) else ":"
            for name, parameter in child.named_trainable_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{node_id}{separator}{name}", parameter


def _module_call(node: Node[Block], adapters: frozenset[int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    block = node.child

    def call(inputs: dict[str, Any]) -> dict[str, Any]:
        frame = FRAME.get()
        if node.trainable and (frame is None or frame.options.training):
            return block.forward(inputs)
        return frozen_forward(block, inputs)

    def adapted_call(inputs: dict[str, Any]) -> Any:
        with active(adapters):
            outputs: Any = call(inputs)
        return Held(outputs, lambda: active(adapters)) if inspect.iscoroutine(outputs) else outputs

    return adapted_call if adapters else call

"""The doors of every level to configuration, state and training, written once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import yaml

from wg_core.assembly.build import Build, checked_entry, open_document, parse_document
from wg_core.assembly.loader import Document
from wg_core.assembly.pool import ModelPool, default_pool
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.assembly.template import default_templates
from wg_core.errors import NodeError, StateDictError
from wg_core.execution.block import Block, LoadReport
from wg_core.execution.executable_graph import Child, ExecutableGraph


def dump_yaml(config: Mapping[str, Any], path: Path | str) -> Path:
    """Write plain data as YAML, in order, readable."""
    target = Path(path)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
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
    def from_yaml_text(
        cls, text: str, *, registry: BlockRegistry | None = None, pool: ModelPool | None = None
    ) -> Self:
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
        build = Build(registry or default_registry(), pool or default_pool(), {}, document)
        return cls.from_entry(checked_entry(document, cls.kind), build)

    def save_config(self, path: Path | str) -> Path:
        """Write `to_config()` as YAML."""
        return dump_yaml(self.to_config(), path)


class Level(Written, ExecutableGraph[Child]):
    """An executable graph that can be written down, loaded and trained."""

    # ---- state and training ----------------------------------------------------------------------------------------

    def keyed_blocks(self) -> dict[str, Block]:
        """Each block below once, sub-blocks included, under the path of its first use."""
        found: dict[str, Block] = {}
        seen: set[int] = set()
        for path, block in self._block_paths():
            if id(block) not in seen:
                seen.add(id(block))
                found[path] = block
        return found

    def _block_paths(self) -> Iterator[tuple[str, Block]]:
        for node_id, node in self.nodes.items():
            child = cast("Block | Level[Any]", node.child)
            if isinstance(child, Level):
                for path, block in cast("Level[Any]", child)._block_paths():
                    yield f"{node_id}/{path}", block
            else:
                yield from _sub_paths(node_id, child)

    def state_dict(self) -> dict[str, Any]:
        """State of all unique blocks below, as `"<path of first use>:<key>" -> tensor or JSON value`."""
        return {f"{path}:{k}": v for path, block in self.keyed_blocks().items() for k, v in block.own_state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Load what `state_dict` gave; nothing changes if it raises.

        Raises: StateDictError for missing or unexpected keys (with `strict`) and wrong shapes.
        """
        current = self.state_dict()
        missing = tuple(k for k in current if k not in state)
        unexpected = tuple(k for k in state if k not in current)
        wrong = [k for k in current if k in state and getattr(current[k], "shape", None) != getattr(state[k], "shape", None)]
        if wrong or (strict and (missing or unexpected)):
            raise StateDictError(
                f"{self.id} cannot load this state: missing {list(missing)}, unexpected {list(unexpected)}, wrong shape {wrong}"
            )
        for path, block in self.keyed_blocks().items():
            own = {k: state.get(f"{path}:{k}", v) for k, v in block.own_state_dict().items()}
            if own:
                block.load_own_state_dict(own)
        return LoadReport(missing, unexpected)

    def set_trainable(self, path: str, trainable: bool = True, *, freeze_others: bool = False) -> None:
        """Choose whether the node at `a/b/c` (or `a.b.c`) takes part in training.

        Raises: NodeError for an unknown path.
        """
        first, _, rest = path.replace(".", "/").partition("/")
        node = self.get_node(first)
        if freeze_others:
            for other in self.nodes.values():
                other.trainable = other is node
        if not rest:
            node.trainable = trainable
        elif isinstance(node.child, Level):
            if trainable:
                node.trainable = True
            cast("Level[Any]", node.child).set_trainable(rest, trainable, freeze_others=freeze_others)
        else:
            raise NodeError(f"{self.id}/{first} is a block; there is no node {rest!r} below it")

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


def _sub_paths(path: str, block: Block) -> Iterator[tuple[str, Block]]:
    yield path, block
    for name, sub in block.get_sub_blocks().items():
        yield from _sub_paths(f"{path}.{name}", sub)

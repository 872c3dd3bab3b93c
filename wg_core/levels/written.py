"""What can be written down: the doors of every level from and to configuration, checkpoints and folders, written once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from wg_core.assembly.build import Build, checked_entry, open_document, parse_document
from wg_core.assembly.loader import Document, dump_yaml
from wg_core.assembly.pool import ModelPool, default_pool
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.assembly.roles import WeightAdapter
from wg_core.assembly.template import default_templates
from wg_core.errors import CheckpointError
from wg_core.execution.block import Block, LoadReport
from wg_core.levels.holders import levels_below, rejoin, shared_blocks
from wg_core.levels.saved import Origins, reading, write_saved
from wg_core.state.canonical import sha256_json
from wg_core.weights.checkpoint import opened, save_checkpoint
from wg_core.weights.load import load_checkpoint
from wg_core.weights.scope import SCOPES, everything, held_by, trained


class Written:
    """A level that can be written down and read again."""

    kind: ClassVar[str] = "graph"
    origins: Origins | None = None  # the files that it was built from

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
        cls,
        path: Path | str,
        *,
        registry: BlockRegistry | None = None,
        pool: ModelPool | None = None,
        allow_outside_root: bool = False,
    ) -> Self:
        """Build from a YAML or JSON file, with its refs, and validate.

        Refs stay inside the folder of the file, unless `allow_outside_root`. Raises: FileNotFoundError, ConfigError.
        """
        return cls._from_document(open_document(path, allow_outside_root=allow_outside_root)[1], registry, pool)

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
        made = cls.from_entry(checked_entry(document, cls.kind), build)
        object.__setattr__(made, "origins", Origins(document.refs, build.registry))
        return made

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

    def trainable_parameters(self) -> list[Any]:
        """Parameters of all trainable nodes below, each tensor once."""
        return []

    def parts(self) -> Iterator[tuple[tuple[str | int, ...], Any]]:
        """The children that are levels, each with the place of its configuration in that of this level."""
        return iter(())

    def save_checkpoint(
        self, path: Path | str, *, format: str = "dir", backend: str = "safetensors", scope: str = "all"
    ) -> Path:
        """Write the state of all blocks below, each once, as a folder (`dir`) or one file (`archive`).

        `scope` `trainable` keeps of each block that has trainable parameters those, its buffers and other values;
        `adapters` keeps what weight adapters hold. Such a checkpoint lists what it lacks. Raises: CheckpointError.
        """
        if scope not in SCOPES:
            raise CheckpointError(f"checkpoint scope {scope!r} is none of {', '.join(SCOPES)}")
        keep = everything
        if scope == "trainable":
            keep = trained(self.trainable_parameters())
        elif scope == "adapters":
            keep = held_by(lambda block: isinstance(block, WeightAdapter))
        return save_checkpoint(
            self.block_paths(), path, kind=self.kind, format=format, backend=backend, scope=scope, keep=keep
        )

    def load_from_checkpoint(
        self,
        path: Path | str,
        *,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
        verify: bool = True,
        on_shared: str = "error",
    ) -> LoadReport:
        """Load what `save_checkpoint` wrote into the blocks below; nothing changes if it raises.

        `rename` maps node paths in the checkpoint to those here. A pooled block that stands in other levels too is
        never changed under them: that raises, or with `on_shared="fork"` a copy with the loaded weights takes its
        places here, known by `reuse: NAME`. What a checkpoint of a smaller scope lacks stays, and is reported missing.

        Raises: FileNotFoundError, CheckpointError, StateDictError.
        """
        paths = list(self.block_paths())
        shared = shared_blocks(paths, list(levels_below([self])), on_shared)
        return load_checkpoint(paths, path, strict=strict, rename=rename, verify=verify, shared=shared)

    def save(
        self,
        folder: Path | str,
        *,
        format: str = "dir",
        backend: str = "safetensors",
        refs: str = "inline",
        training: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write structure and weights to `folder`: `config.yaml`, the checkpoint, and a manifest with their hashes.

        With `refs` `inline` the configuration is one file that needs no other; `extract` puts each level below into a
        file of its own in the folder; `keep` writes the refs of the files that this level was built from, which then
        must stay where they are. `training` is the training configuration, as plain data, for whoever goes on from it.

        Raises: ConfigError for an unregistered block, or a part that is no longer what the ref to keep says;
        CheckpointError.
        """
        return write_saved(self, Path(folder), format=format, backend=backend, refs=refs, training=training)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        registry: BlockRegistry | None = None,
        pool: ModelPool | None = None,
        verify: bool = True,
        on_shared: str = "error",
        allow_outside_root: bool = False,
    ) -> Self:
        """Build what `save` wrote, with its weights; the model references that it was built from need not exist any more.

        Blocks come from a pool of its own unless one is given, so that no other user of a model is touched; with a pool
        `on_shared` is that of `load_from_checkpoint`. Refs that were kept need `allow_outside_root`. With `verify` the
        hashes of all files, and that of the contract, are compared. What was one block is one again.

        Raises: FileNotFoundError, CheckpointError, ConfigError.
        """
        with reading(Path(folder), cls.kind, verify) as saved:
            built = cls.from_yaml(
                saved.config,
                registry=registry,
                pool=ModelPool() if pool is None else pool,
                allow_outside_root=allow_outside_root,
            )
            if verify:
                saved.check_contract(built)
            with opened(saved.checkpoint, verify) as store:
                rejoin(list(built.block_paths()), list(levels_below([built])), store.paths)
            built.load_from_checkpoint(saved.checkpoint, verify=verify, on_shared=on_shared)
            return built

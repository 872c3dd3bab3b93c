"""LoRA worlds: a frozen base world, and sets of adapters that make another world of it."""

from __future__ import annotations

import json
import math
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, cast

from pydantic import ValidationError as PydanticError

from wg_core.assembly.build import Build
from wg_core.assembly.loader import dump_yaml
from wg_core.assembly.models import SCHEMA_VERSION, AdaptersEntry, AdapterSetEntry, WorldEntry
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.errors import AdapterError, CheckpointError, ConfigError, NodeError, did_you_mean
from wg_core.execution.block import Block, LoadReport
from wg_core.levels.adapter_sets import AdapterLine, Spot, node_path, put_block, report, spots, twin
from wg_core.levels.flow import Flow
from wg_core.levels.holders import levels_below, shared_blocks
from wg_core.levels.world import World
from wg_core.state.canonical import parse_json, sha256_json
from wg_core.state.files import TEMP_PREFIX, make_folder, write_file
from wg_core.state.store import SnapshotStore
from wg_core.structure.ids import check_id, safe_path
from wg_core.weights.checkpoint import put_folder
from wg_core.weights.load import load_checkpoint
from wg_core.weights.lora import Places
from wg_core.weights.peft_layout import AdapterFile, read_adapter

INDEX = "adapters.json"
FORMAT = "wg-adapters"


class LoraWorld(World):
    """A world that runs the stages of `base` over the very same blocks, changed by its own adapters and by no others.

    `sets` are the adapter sets by name, `active` those that work (by default all); which adapter works in a call is
    seen from the call itself, so base and LoRA worlds run side by side on one instance of each model, also in several
    threads. The base stays as it is: what learns are the adapters of active sets. `folder` holds what sets have learned,
    and is read at the first call.

    Raises: ConfigError for a target that is no part of the base, AdapterError for a base that is a LoRA world itself.
    """

    def __init__(
        self,
        base: World,
        world_id: str,
        sets: Mapping[str, AdapterSetEntry | Mapping[str, Any]],
        *,
        active: Sequence[str] | None = None,
        folder: Path | str | None = None,
        title: str | None = None,
        tags: Sequence[str] | None = None,
        content: Mapping[str, Any] | None = None,
        store: SnapshotStore | None = None,
        seed: int | None = None,
        budget: Mapping[str, Any] | None = None,
        registry: BlockRegistry | None = None,
        source: Path | None = None,
    ) -> None:
        if isinstance(base, LoraWorld):
            raise AdapterError(
                f"{base.world_id!r} is a LoRA world; build {world_id!r} on its base {base.base.world_id!r}, with the sets of both"
            )
        if check_id(world_id, "world id") == base.world_id:
            raise ConfigError(f"a LoRA world needs an id of its own; {world_id!r} is that of its base")
        super().__init__(
            world_id, {name: twin(stage, trainable=False) for name, stage in base.stages.items()},
            title=title, tags=base.tags if tags is None else tags, store=store or base.store,
            content=base._content_seed if content is None else content, seed=base.seed if seed is None else seed,
        )  # fmt: skip
        self.base = base
        self.folder = source or base.folder
        self.adapter_folder = None if folder is None else Path(folder)
        self._linked = dict(base._linked)
        self._own: dict[str, Any] = {"content": content, "seed": seed, "budget": None if budget is None else dict(budget)}
        limits = base._execution.get("budget") if budget is None else dict(budget)
        if limits:
            self._execution.update(budget=limits)
        self._registry = registry or default_registry()
        self._sets: dict[str, AdapterSetEntry] = {}
        self._spots: dict[str, list[Spot]] = {}
        self._adapters: dict[str, dict[str, Any]] = {}
        self._active: tuple[str, ...] = ()
        self._resting: set[str] = set()
        if not base.canonical:
            self.set_cycle(base.cycle)
        self.set_state_schema(base.state_schema)
        hanging: list[Any] = []
        self._hanging = hanging  # of this world's adapters, all that hang on blocks, which outlive it
        weakref.finalize(self, _let_go, hanging).atexit = False
        for name, entry in sets.items():
            self._add(name, entry, learned=self._learned(name))
        self.set_adapter(list(self._sets) if active is None else active)

    # ---- sets ------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> tuple[str, ...]:
        """The sets that work."""
        return self._active

    @property
    def sets(self) -> dict[str, AdapterSetEntry]:
        """The sets by name, as a file writes them."""
        return dict(self._sets)

    def adapters(self, name: str | None = None) -> dict[str, Any]:
        """The adapters of a set by key, or of all sets by `set/key`. Raises: NodeError for an unknown set."""
        if name is None:
            return {f"{n}/{key}": a for n, found in self._adapters.items() for key, a in found.items()}
        return dict(self._adapters[self._known(name)])

    def adapter_report(self) -> list[AdapterLine]:
        """What became of each use of a block: its adapters, or why it has none."""
        return report(self.base, self._spots)

    def add_adapter(self, name: str, **settings: Any) -> list[Spot]:
        """Add a set that changes nothing until it has learned, and let it work. `settings` as in a file.

        Raises: ConfigError for a taken name or a wrong setting.
        """
        self._add(name, settings)
        self.set_adapter([*self._active, name])
        return list(self._spots[name])

    def delete_adapter(self, name: str) -> None:
        """Forget a set with what it learned; its files stay. Raises: NodeError."""
        self.set_adapter([n for n in self._active if n != self._known(name)])
        for adapter in self._adapters.pop(name).values():
            adapter.detach()
            self._hanging.remove(adapter)
        del self._sets[name], self._spots[name]

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Let these sets work from the next call on and no others; nothing is loaded. Raises: NodeError."""
        chosen = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
        for name in chosen:
            self._known(name)
        self._active = chosen
        for name, found in self._spots.items():
            for spot in found:
                paths = [f"{self.world_id}/{node_path(path)}" for path in spot.paths] if name in chosen else []
                self._adapters[name][spot.key].attach(spot.block, places=Places.of(paths))

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "svd", **more: Any
    ) -> None:
        """Make a set that is the weighted sum of others, as PEFT's method of this name does, which computes it.

        It works only after `set_adapter`. Raises: AdapterError for sets that work at different places or that PEFT
        cannot combine so, NodeError, ConfigError for a taken name.
        """
        if not adapters or len(adapters) != len(weights):
            raise AdapterError(f"{len(adapters)} adapter sets and {len(weights)} weights; give one weight for each set")
        if not all(math.isfinite(weight) for weight in weights):
            raise AdapterError(f"the weights of adapter sets are finite numbers, not {list(weights)}")
        places: dict[str, Spot] = {}
        for name in adapters:
            for spot in self._spots[self._known(name)]:
                if places.setdefault(spot.key, spot).paths != spot.paths:
                    raise AdapterError(
                        f"sets {', '.join(adapters)} work at different places on {spot.key!r}; combine sets with the same targets"
                    )
        made: dict[str, Any] = {}
        for key in places:
            parts = [(self._adapters[n][key], w) for n, w in zip(adapters, weights, strict=True) if key in self._adapters[n]]
            first, *others = [adapter for adapter, _ in parts]
            made[key] = first.combined(others, [w for _, w in parts], combination_type=combination_type, **more)
        rank = max(a.rank for a in made.values())
        of = [self._sets[n] for n in adapters]
        entry = of[0].model_copy(update={
            "rank": rank, "alpha": float(rank), "targets": list(dict.fromkeys(t for e in of for t in e.targets)),
            "modules": list(dict.fromkeys(m for e in of for m in e.modules)),
        })  # fmt: skip
        self._take(adapter_name, entry, list(places.values()), made)

    def _known(self, name: str) -> str:
        if name not in self._sets:
            raise NodeError(f"world {self.world_id!r} has no adapter set {name!r}; {did_you_mean(name, self._sets)}")
        return name

    def _learned(self, name: str) -> Path | None:
        """The folder with what a set has learned; one that is named by a file is relative to that file."""
        if self.adapter_folder is None:
            return None
        return safe_path((self.folder or Path()) / self.adapter_folder, name)

    def _add(self, name: str, entry: AdapterSetEntry | Mapping[str, Any], learned: Path | None = None) -> None:
        try:
            checked = AdapterSetEntry.model_validate(entry)
        except PydanticError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            raise ConfigError(f"adapter set {name!r}: {problems}") from None
        found = spots(self.base, checked, name)
        settings = checked.model_dump(include={"modules", "rank", "alpha", "dropout", "init_seed"})
        made: dict[str, Any] = {}
        for spot in found:
            config = {**settings, "target": spot.paths[0]}
            if learned is not None:
                config["checkpoint_ref"] = str(learned / spot.key)
            made[spot.key] = self._registry.build({"block_type": checked.block_type, "config": config})
        self._take(name, checked, found, made)

    def _take(self, name: str, entry: AdapterSetEntry, found: list[Spot], made: dict[str, Any]) -> None:
        if check_id(name, "adapter set") in self._sets:
            raise ConfigError(f"world {self.world_id!r} has an adapter set {name!r}; choose another name, or delete_adapter first")
        self._sets[name], self._spots[name], self._adapters[name] = entry, found, made
        self._hanging.extend(made.values())
        self.set_adapter(self._active)

    def close(self) -> None:
        """Let go of the blocks of the base; this world then runs as its base does."""
        _let_go(self._hanging)

    # ---- what they learned -------------------------------------------------------------------------------------------

    def save_adapters(self, folder: Path | str, names: Iterable[str] | None = None) -> Path:
        """Write sets (by default all) to `folder`, whole or not at all: `SET/KEY/` in PEFT's layout, and an index.

        Raises: NodeError for an unknown set, CheckpointError for a folder that holds something else.
        """
        target, chosen = Path(folder), list(self._sets if names is None else names)
        make_folder(target.parent)
        temp = target.parent / f"{TEMP_PREFIX}{secrets.token_hex(6)}"
        pinned = self.base.config_hash
        try:
            for name in chosen:
                for spot in self._spots[self._known(name)]:
                    identity = {"world": self.base.world_id, "config_hash": pinned, "block_key": spot.key, "paths": list(spot.paths)}
                    self._adapters[name][spot.key].save_adapter(temp / name / spot.key, **identity)
            index = {
                "format": FORMAT, "schema_version": SCHEMA_VERSION, "world_id": self.world_id,
                "base": {"world_id": self.base.world_id, "config_hash": pinned},
                "sets": {name: self._sets[name].model_dump(mode="json", exclude_defaults=True) for name in chosen},
            }  # fmt: skip
            write_file(temp / INDEX, json.dumps(index, indent=1).encode("utf-8"))
            put_folder(temp, target, INDEX)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return target

    def load_adapters(self, folder: Path | str, names: Iterable[str] | None = None) -> None:
        """Take over sets that `save_adapters` wrote (by default all of them); sets that are not here yet are added.

        A set of one's own may also be made of folders that PEFT wrote: `adapters(SET)[KEY].load_adapter(FOLDER)`.
        Nothing changes if it raises: MissingModelError, AdapterError, CheckpointError, ConfigError.
        """
        source = Path(folder)
        if not (source / INDEX).is_file():
            raise AdapterError(f"{source} holds no adapter sets: it has no {INDEX}")
        index = cast("dict[str, Any]", parse_json((source / INDEX).read_bytes()))
        if index.get("format") != FORMAT:
            raise AdapterError(f"{source / INDEX} has the format {index.get('format')!r}, not {FORMAT!r}")
        stored: dict[str, Any] = index["sets"]
        chosen = list(stored if names is None else names)
        lacking = [name for name in chosen if name not in stored]
        if lacking:
            raise AdapterError(f"{source} holds no set {lacking[0]!r}; {did_you_mean(lacking[0], stored)}")
        new = [name for name in chosen if name not in self._sets]
        read: list[tuple[Any, AdapterFile]] = []
        try:
            for name in new:
                self._add(name, stored[name])
            for name in chosen:
                for spot in self._spots[name]:
                    spot.block.materialize()
                    path = safe_path(source, name, spot.key)
                    read.append((self._adapters[name][spot.key], read_adapter(path, cast(Any, spot.block))))
        except BaseException:
            for name in new:
                if name in self._sets:
                    self.delete_adapter(name)
            raise
        for adapter, file in read:
            adapter.take_shape(file.shape)
            adapter.load_state_dict(file.state)

    def merged(self, world_id: str) -> World:
        """An ordinary world in which what the active sets learned is part of the weights, of copies of the blocks.

        It is saved with `save`, as any other. Raises: AdapterError for an adapted block that is a part of another block.
        """
        stages = {name: twin(stage, trainable=True) for name, stage in self.base.stages.items()}
        copies: dict[frozenset[int], Block] = {}
        for path, block in self.base.block_paths():
            on = [self._adapters[n][s.key] for n in self._active for s in self._spots[n] if s.block is block and path in s.paths]
            if not on:
                continue
            if node_path(path) != path:
                raise AdapterError(f"{path} is a part of another block, which cannot be copied with its weights merged")
            made = frozenset(map(id, on))
            if made not in copies:
                copies[made] = merged_copy(block, on, self._registry)
            stage, _, below = path.partition("/")
            put_block(stages[stage], below, copies[made])
        settings = {k: v for k, v in self.base._execution.items() if k != "stages"}
        world = World(
            world_id, stages, title=self.title, tags=self.tags, content=self._content_seed, execution=settings,
            store=self.store, seed=self.seed,
        )  # fmt: skip
        if not self.base.canonical:
            world.set_cycle(self.base.cycle)
        world.set_state_schema(self.base.state_schema)
        return world

    # ---- training and state ------------------------------------------------------------------------------------------

    def block_paths(self) -> Iterator[tuple[str, Block]]:
        yield from super().block_paths()
        for name, adapter in self.adapters().items():
            yield f"adapters/{name}", adapter

    def parts(self) -> Iterator[tuple[tuple[str | int, ...], Any]]:
        yield ("execution", "base", "world"), self.base

    def load_from_checkpoint(
        self,
        path: Path | str,
        *,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
        verify: bool = True,
        on_shared: str = "error",
    ) -> LoadReport:
        """As for every level; a base that other levels hold too is never changed, nor copied under its adapters.

        Raises: also CheckpointError for `on_shared="fork"`.
        """
        if on_shared == "fork":
            raise CheckpointError(
                f"{self.world_id!r} is a LoRA world and its base stays one; load its sets with load_adapters, or load the world "
                "into a pool of its own"
            )
        paths = list(self.block_paths())
        inside = list(levels_below([self.base, *self.stages.values()]))
        return load_checkpoint(
            paths, path, strict=strict, rename=rename, verify=verify, shared=shared_blocks(paths, inside, on_shared)
        )

    def set_trainable(self, path: str, trainable: bool = True, *, freeze_others: bool = False) -> None:
        """Choose which adapters learn: `adapters/SET/KEY`, what is below `adapters/SET`, or a glob. The base never does.

        Raises: NodeError for a path that meets no adapter.
        """
        known = {f"adapters/{name}" for name in self.adapters()}
        met = {name for name in known if name == path or name.startswith(f"{path}/") or fnmatchcase(name, path)}
        if not met:
            raise NodeError(f"{self.world_id}: {path!r} is no adapter, and the base stays as it is; {did_you_mean(path, known)}")
        self._resting = (known if freeze_others else self._resting) - met if trainable else self._resting | met

    def trained_blocks(self) -> Iterator[tuple[str, Block]]:
        """The adapters of all active sets that were not told to rest."""
        for name in self._active:
            for key, adapter in self._adapters[name].items():
                if f"adapters/{name}/{key}" not in self._resting:
                    yield f"adapters/{name}/{key}", adapter

    def resting_hashes(self) -> dict[str, str | None]:
        """As at any level, without the sets that do not work."""
        found = super().resting_hashes()
        idle = tuple(f"adapters/{name}/" for name in self._sets if name not in self._active)
        return {path: digest for path, digest in found.items() if not path.startswith(idle)}

    def models(self) -> dict[str, str | None]:
        """Model key -> hash of its weights where it has local ones, the adapters of active sets among them."""
        return dict(sorted({**super().models(), **self._learned_hashes()}.items()))

    def _learned_hashes(self) -> dict[str, str | None]:
        return {f"adapter/{n}/{key}": a.weight_hash() for n in self._active for key, a in self._adapters[n].items()}

    def _journal_key(self, role: str, flow: Flow) -> str:
        """What a stage made with other numbers in its adapters is not taken up again."""
        return sha256_json({"stage": super()._journal_key(role, flow), "adapters": self._learned_hashes()})

    def fork(self, new_id: str, step: int | None = None) -> LoraWorld:
        """As `World.fork`; the new world has adapters of its own that begin with what these learned."""
        self.store.fork(self.world_id, self._published(step).step, new_id)
        forked = LoraWorld(
            self.base, new_id, self._sets, active=self._active, folder=self.adapter_folder, title=self.title, tags=self.tags,
            store=self.store, registry=self._registry, source=self.folder, **self._own,
        )  # fmt: skip
        forked._execution.update(self._execution)
        for name, adapter in self.adapters().items():
            if adapter.materialized:
                other = forked.adapters()[name]
                other.take_shape(adapter.shape)
                other.load_state_dict(adapter.state_dict())
        return forked

    # ---- configuration -----------------------------------------------------------------------------------------------

    @classmethod
    def from_entry(cls, entry: WorldEntry, build: Build) -> Self:
        execution = entry.execution
        assert execution.base is not None and execution.adapters is not None
        base = World.from_entry(execution.base.world, build.at("execution", "base", "world"))
        pinned = execution.base.config_hash
        if pinned not in (None, base.config_hash):
            raise build.at("execution", "base", "config_hash").error(ConfigError(
                f"world {entry.world_id!r} stands on {base.world_id!r} with config hash {pinned}, but that world now has "
                f"{base.config_hash}; restore it, or take the hash out and train the adapters again"
            ))  # fmt: skip
        file, root = Path(build.document.source), execution.storage.root
        own = entry.model_fields_set
        try:
            world = cls(
                base, entry.world_id, execution.adapters.sets,
                active=execution.adapters.active, folder=execution.adapters.folder,
                title=entry.title, tags=entry.tags if "tags" in own else None,
                content=cast("dict[str, Any]", entry.content) if "content" in own else None,
                seed=execution.seed, registry=build.registry,
                budget=execution.budget.model_dump(exclude_none=True) if "budget" in execution.model_fields_set else None,
                source=file.parent if file.is_file() else None,
            )  # fmt: skip
        except (ConfigError, AdapterError) as error:
            raise build.at("execution", "adapters").error(error) from error
        if root:
            world.set_storage(root)
        return world

    def to_config(self) -> dict[str, Any]:
        return self._config(self.base.to_config())

    def save_config(self, path: Path | str, *, base_file: str | None = None) -> Path:
        """Write the world file; with `base_file` it refers to the base's file (relative to `path`) in place of holding it."""
        return dump_yaml(self._config({"ref": base_file}) if base_file is not None else self.to_config(), path)

    def _config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        rest = {"seed": self._own["seed"], "storage": self._execution.get("storage"), "budget": self._own["budget"]}
        rest = {k: v for k, v in rest.items() if v is not None}
        config: dict[str, Any] = {
            "kind": "world", "schema_version": SCHEMA_VERSION, "world_id": self.world_id, "title": self.title, "tags": self.tags,
            "execution": {"base": {"world": dict(base), "config_hash": self.base.config_hash}, "adapters": self._adapters_config(), **rest},
        }  # fmt: skip
        if self._own["content"] is not None:
            config["content"] = self._content_seed
        return config

    def _adapters_config(self) -> dict[str, Any]:
        entry = AdaptersEntry(
            folder=None if self.adapter_folder is None else str(self.adapter_folder), sets=self._sets,
            active=None if self._active == tuple(self._sets) else list(self._active),
        )  # fmt: skip
        return entry.model_dump(mode="json", exclude_defaults=True)

    def hashed(self) -> dict[str, Any]:
        """The base by its hash, and the adapter sets; where what they learned lies does not count, its hashes are in `models`."""
        adapters = {k: v for k, v in self._adapters_config().items() if k != "folder"}
        return {"base": self.base.config_hash, "adapters": adapters, "seed": self.seed}

    def __repr__(self) -> str:
        return f"<LoraWorld {self.world_id} on {self.base.world_id}: {', '.join(self._active) or 'no set'}>"


def lora_world(
    base: World,
    world_id: str,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("*",),
    per_stage: bool = False,
    name: str = "default",
    modules: Sequence[str] = ("all-linear",),
    **more: Any,
) -> LoraWorld:
    """A LoRA world on `base` with one adapter set, which changes nothing until it has learned.

    `alpha` is twice the rank unless given. `targets` are path globs (`author/*`), `stage:GLOB` or `role:GLOB`; blocks
    without local weights are passed over, and listed by `adapter_report`. `more` as for `LoraWorld`.

    Raises: ConfigError, AdapterError.
    """
    entry = {
        "rank": rank, "alpha": 2.0 * rank if alpha is None else alpha, "targets": list(targets),
        "modules": list(modules), "per_stage": per_stage,
    }  # fmt: skip
    return LoraWorld(base, world_id, {name: entry}, **more)


def merged_copy(block: Block, adapters: Sequence[Any], registry: BlockRegistry) -> Block:
    """A block of its own with the weights of `block`, and what adapters learned added to them; `block` is only read."""
    if block.block_type is not None:
        copy: Any = registry.build({"block_type": block.block_type, "config": {**block.config, **block.placement, "reuse": False}})
    else:
        args, kwargs = block._arguments
        copy = type(block)(*args, **kwargs)
    block.materialize()
    copy.build(read_reference=False)
    copy.load_own_state_dict(block.own_state_dict())
    for adapter in adapters:
        adapter.merge_into(copy)
    return copy


def _let_go(adapters: list[Any]) -> None:
    for adapter in adapters:
        adapter.detach()
    adapters.clear()

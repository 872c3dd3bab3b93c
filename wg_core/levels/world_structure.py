"""What a world consists of: its stages and their cycle, its content, its place in files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

from wg_core.assembly.build import Build
from wg_core.assembly.models import CANONICAL, UPDATE, WorldEntry
from wg_core.errors import (
    ConfigError,
    NodeError,
    UnexpectedInputError,
    did_you_mean,
)
from wg_core.execution.block import Block
from wg_core.execution.context import (
    FRAME,
    Frame,
    Hook,
    RunOptions,
)
from wg_core.execution.drawing import Drawing, draw_cycle
from wg_core.execution.node import Node
from wg_core.execution.validate import ValidationResult
from wg_core.levels.end_world import EndWorld, end_world_folders, find_end_world, linked_end_worlds
from wg_core.levels.example import example_state
from wg_core.levels.stage import Stage
from wg_core.levels.training import Trained
from wg_core.levels.world_checks import world_issues
from wg_core.levels.written import Written
from wg_core.state.canonical import sha256_json
from wg_core.state.content import WorldContent, WorldView
from wg_core.state.forms import DEFAULT_SCHEMA
from wg_core.state.home import home
from wg_core.state.schemas import intent_schema, offered, outcome_schema
from wg_core.state.state import State, StateSchema
from wg_core.state.store import SnapshotStore
from wg_core.structure.ids import check_id

_log = logging.getLogger("wg_core.world")


class WorldStructure(Trained, Written):
    """Stages in a cycle, the content that they write, and where its snapshots lie."""

    level = kind = "world"

    def __init__(
        self,
        world_id: str,
        stages: Mapping[str, Stage] | None = None,
        *,
        title: str | None = None,
        tags: Sequence[str] = (),
        content: Mapping[str, Any] | None = None,
        execution: Mapping[str, Any] | None = None,
        store: SnapshotStore | None = None,
        seed: int | None = None,
    ) -> None:
        self.world_id = check_id(world_id, "world id")
        self.title = title or world_id
        self.tags = list(tags)
        self.stages: dict[str, Stage] = {}
        self.seed = seed
        self.store = store if store is not None else SnapshotStore(home() / "snapshots")
        self.hooks: list[Hook] = []
        self.state_schema = DEFAULT_SCHEMA
        self.folder: Path | None = None
        self._execution = dict(execution or {})
        self._places: dict[str, Node[Stage]] = {}
        self._cycle: list[str] | None = None
        self._next: dict[str, str] = {}
        self._reading: tuple[str, WorldContent] | None = None
        self._linked: dict[str, EndWorld | None] = {}
        self.set_initial_content(content or {})
        self.set_canonical_cycle()
        for name, stage in (stages or {}).items():
            self.add_stage(stage, name)

    # ---- building --------------------------------------------------------------------------------------------------

    def add_stage(self, stage: Stage, name: str | None = None) -> str:
        """Add a stage under its role (or `name`) and give that name.

        Raises: NodeError for a taken name, or that of the built-in World update.
        """
        name = check_id(name or stage.role, "stage name")
        if name == UPDATE:
            raise NodeError(f"{UPDATE!r} is built in; it applies a full state to the content and has no pipelines")
        if name in self.stages:
            raise NodeError(f"world {self.world_id!r} has a stage {name!r} already; give each its own name")
        found = {**self.stages, name: stage}
        self.stages = {n: found[n] for n in sorted(found, key=self._place)}
        return name

    def _place(self, name: str) -> int:
        return self.cycle.index(name) if name in self.cycle else len(self.cycle)

    @property
    def cycle(self) -> tuple[str, ...]:
        """The order in which a step runs the stages, World update among them."""
        return tuple(self._cycle) if self._cycle is not None else CANONICAL

    @property
    def canonical(self) -> bool:
        """Whether the cycle is that of the six stages."""
        return self._cycle is None

    def set_cycle(self, cycle: Sequence[str]) -> None:
        """A cycle of one's own: every stage once, and `world_update` at most once.

        The state is replaced by an empty one before the stage after World update; in a cycle without World update the
        content never changes and no state is replaced. Raises: ConfigError for a name that is missing, unknown or
        there twice.
        """
        names = list(cycle)
        for name in names:
            if name != UPDATE and name not in self.stages:
                known = [*self.stages, UPDATE]
                raise ConfigError(f"cycle: world {self.world_id!r} has no stage {name!r}; {did_you_mean(name, known)}")
            if names.count(name) > 1:
                raise ConfigError(
                    f"cycle: {name!r} stands there {names.count(name)} times; each stage runs once in a step"
                )
        missing = [name for name in self.stages if name not in names]
        if missing:
            raise ConfigError(f"cycle: {', '.join(missing)} is missing; a cycle holds every stage once")
        self._cycle = names
        self._connect()

    def drawing(self) -> Drawing:
        """The cycle with its stages, for `to_mermaid` and `to_dot`."""
        title = f"world {self.world_id}" + (f" ({self.title})" if self.title else "")
        return draw_cycle(title, self.cycle, self.stages)

    def to_mermaid(self) -> str:
        """The cycle as a Mermaid flowchart, with everything below."""
        return self.drawing().mermaid()

    def to_dot(self) -> str:
        """The cycle as a Graphviz digraph, with everything below."""
        return self.drawing().dot()

    def set_canonical_cycle(self) -> None:
        """The cycle of the six stages, with what each of them reads and writes."""
        self._cycle = None
        self._connect()

    def _connect(self) -> None:
        self._next = dict(zip(self.cycle, (*self.cycle[1:], *self.cycle[:1]), strict=True))
        self.stages = {n: self.stages[n] for n in sorted(self.stages, key=self._place)}

    def next_stage(self, name: str) -> str:
        """The stage that runs after `name`; after the last one, the first. Raises: NodeError."""
        if name not in self._next:
            raise NodeError(f"the cycle of {self.world_id!r} has no stage {name!r}; {did_you_mean(name, self._next)}")
        return self._next[name]

    def set_state_schema(self, schema: StateSchema | Mapping[str, Any]) -> None:
        """Fields that this world adds to the blocks of the state, `{block: {field: JSON Schema}}`. Raises: ConfigError."""
        self.state_schema = schema if isinstance(schema, StateSchema) else StateSchema(schema)

    def set_storage(self, storage: SnapshotStore | Path | str) -> None:
        """Keep snapshots in this store or folder."""
        self.store = storage if isinstance(storage, SnapshotStore) else SnapshotStore(storage)
        self._execution["storage"] = {"root": str(self.store.root)}
        self._reading = None

    def set_initial_content(self, content: Mapping[str, Any]) -> None:
        """The content that step 0 begins with, in the form of a world file. Raises: ConfigError naming the path."""
        self.initial_content = WorldContent.from_seed(content)
        self._content_seed = dict(content)

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """All that can be said about the world without running it. Raises: ValidationError if `strict` and invalid."""
        result = ValidationResult(list(world_issues(self, deep, for_training)))
        if strict and not result.is_valid:
            result.raise_errors()
        return result

    def _must_be_whole(self) -> None:
        for name in (*self.cycle, *self.stages):
            if (name != UPDATE and name not in self.stages) or name not in self._next:
                lacking = [n for n in self.cycle if n != UPDATE and n not in self.stages]
                idle = [n for n in self.stages if n not in self._next]
                what = (
                    f"lacks the stages {', '.join(lacking)}" if lacking else f"has {', '.join(idle)} outside its cycle"
                )
                raise ConfigError(f"world {self.world_id!r} {what}; its cycle is {', '.join(self.cycle)}")

    # ---- End Worlds ------------------------------------------------------------------------------------------------

    def linked_ids(self) -> list[str]:
        """The End Worlds that the world's file links to, in order."""
        return linked_end_worlds(self.initial_content.links)

    def link(self, end_world: EndWorld) -> None:
        """Resolve links to this End World with this very object."""
        self._linked[end_world.world_id] = end_world

    def end_world(self, id: str) -> EndWorld:
        """The End World behind a link. Raises: ConfigError where it is not found."""
        found = self.find_end_world(id)
        if found is None:
            places = ", ".join(str(f) for f in end_world_folders(self.folder))
            raise ConfigError(f"end world {id!r} is not found in {places}; put its folder there, or link({id})")
        return found

    def find_end_world(self, id: str) -> EndWorld | None:
        """The End World behind a link, None where it is not found."""
        if self._linked.get(id) is None:
            self._linked[id] = find_end_world(id, end_world_folders(self.folder))
        return self._linked[id]

    def _view(self, content: WorldContent) -> WorldView:
        """The view of a content with the End Worlds that it links to; one that is not found is left out, and said so."""
        linked: dict[str, WorldContent] = {}
        for id in linked_end_worlds(content.links):
            found = self.find_end_world(id)
            if found is None:
                _log.warning(
                    "world %r: the linked end world %r is not found; its passages are left out", self.world_id, id
                )
            else:
                linked[id] = found.content
        return content.view(linked=linked)

    def freeze(
        self, end_world_id: str, folder: Path | str | None = None, *, step: int | None = None, title: str | None = None
    ) -> EndWorld:
        """Write the content, as it is after a step (by default the last one), as an End World that never changes.

        `folder` is `worlds/END_WORLD_ID` unless given. Raises: ConfigError if it exists.
        """
        check_id(end_world_id, "end world id")
        content = self.content(None if step is None else self.store.get(self.world_id, step).content)
        target = Path(folder) if folder is not None else Path("worlds") / end_world_id
        return EndWorld.write(
            end_world_id, content, self.store.blobs, target, title=title or self.title, tags=self.tags
        )

    # ---- configuration ---------------------------------------------------------------------------------------------

    @classmethod
    def from_entry(cls, entry: WorldEntry, build: Build) -> Self:
        if entry.execution.base is not None:
            from wg_core.levels.lora_world import LoraWorld

            return cast(Self, LoraWorld.from_entry(entry, build))
        build = Build(build.registry, build.pool, entry.execution.models, build.document, build.where)
        stages: dict[str, Stage] = {}
        frozen: list[str] = []
        for role, stage_entry in entry.execution.stages.items():
            here = build.at("execution", "stages", role)
            if stage_entry.role not in (None, role) and entry.execution.cycle == "canonical":
                raise here.error(
                    ConfigError(f"this stage stands under {role!r} but names the role {stage_entry.role!r}")
                )
            named = stage_entry.model_copy(update={"role": stage_entry.role or role, "id": stage_entry.id or role})
            stages[role] = Stage.from_entry(named, here)
            frozen += [] if stage_entry.trainable else [role]
        root = entry.execution.storage.root
        try:
            world = cls(
                entry.world_id,
                stages,
                title=entry.title,
                tags=entry.tags,
                content=cast(dict[str, Any], entry.content),
                execution=entry.execution.model_dump(mode="json", exclude_defaults=True),
                store=SnapshotStore(Path(root) if root else home() / "snapshots"),
                seed=entry.execution.seed,
            )
        except ConfigError as error:
            raise build.at("content").error(error) from error
        here = build.at("execution", "cycle")
        try:
            if entry.execution.cycle != "canonical":
                world.set_cycle(entry.execution.cycle)
            here = build.at("execution")
            world._must_be_whole()
            here = build.at("execution", "state_schema")
            world.set_state_schema(entry.execution.state_schema)
        except ConfigError as error:
            raise here.error(error) from error
        for role in frozen:
            world.set_trainable(role, False)
        source = Path(build.document.source)
        world.folder = source.parent if source.is_file() else None
        return world

    def to_config(self) -> dict[str, Any]:
        stages: dict[str, Any] = {}
        for role, stage in self.stages.items():
            entry = stage.to_config()
            stages[role] = {
                k: v
                for k, v in entry.items()
                if k not in ("kind", "schema_version") and (k, v) not in (("id", role), ("role", role))
            }
            if not self.places()[role].trainable:
                stages[role]["trainable"] = False
        return {
            "kind": "world",
            "schema_version": "1.0",
            "world_id": self.world_id,
            "title": self.title,
            "tags": self.tags,
            "execution": {**self._settings(), "stages": stages},
            "content": self._content_seed,
        }

    def _settings(self) -> dict[str, Any]:
        """What stands in `execution` beside the stages."""
        rest = {k: v for k, v in self._execution.items() if k not in ("cycle", "stages", "state_schema")}
        if self._cycle is not None:
            rest["cycle"] = list(self._cycle)
        if self.state_schema.extra:
            rest["state_schema"] = self.state_schema.extra
        return rest

    def hashed(self) -> dict[str, Any]:
        """What decides how this world runs: each stage as its hash, so that it may run anywhere.

        Where snapshots lie does not count, nor what a step may cost.
        """
        rest = {k: v for k, v in self._settings().items() if k not in ("storage", "budget")}
        return {**rest, "stages": {role: _stage_hash(stage) for role, stage in self.stages.items()}}

    def block_paths(self) -> Iterator[tuple[str, Block]]:
        for role, stage in self.stages.items():
            for path, block in stage.block_paths():
                yield f"{role}/{path}", block

    def parts(self) -> Iterator[tuple[tuple[str | int, ...], Any]]:
        for role, stage in self.stages.items():
            yield ("execution", "stages", role), stage

    def iter_blocks(self) -> Iterator[Block]:
        """All blocks of all stages, each instance once."""
        seen: set[int] = set()
        for stage in self.stages.values():
            for block in stage.iter_blocks():
                if id(block) not in seen:
                    seen.add(id(block))
                    yield block

    def models(self) -> dict[str, str | None]:
        """Model key -> hash of its weights where it has local ones."""
        found: dict[str, str | None] = {}
        for block in self.iter_blocks():
            key = block.model_ref()
            if key is not None:
                found["/".join(key[:3])] = block.weight_hash()
        for remote in (r for stage in self.stages.values() for r in stage.remotes()):
            found.update(remote.contract.models if remote.contract else {})
        return dict(sorted(found.items()))

    # ---- content and schemas ---------------------------------------------------------------------------------------

    def content(self, root: str | None = None) -> WorldContent:
        """The content at a root hash, by default at the head."""
        if root is None:
            head = self.store.head(self.world_id)
            if head is None:
                return self.initial_content
            root = head.content
        if self._reading is None or self._reading[0] != root:
            self._reading = (root, WorldContent.load(self.store.blobs, root))
        return self._reading[1]

    def example_state(self, blocks: Sequence[int | str]) -> State:
        """A valid state with just these blocks."""
        return example_state(blocks, self.store.blobs.put)

    def schema_for(
        self, block: str, content: WorldContent, state: State | None = None, *, seed: int = 0
    ) -> dict[str, Any]:
        """The JSON schema that this world allows for a block: names and numbers restricted to what there is.

        Of many names a few are offered, drawn by `seed`; those in the focus of `state`'s intent come first.
        """
        if block == "generation_config":
            creators = [stage for stage in self.stages.values() if "artifacts" in stage.writes]
            for maker in (m for stage in creators for m in (*stage.iter_blocks(), *stage.remotes())):
                request_schema = getattr(maker, "request_schema", None)
                if request_schema is not None:
                    names = {kind: offered(content.ids(kind), seed) for kind in ("entity", "place", "term")}
                    return self._extended(block, cast("Callable[..., dict[str, Any]]", request_schema)(names))
        if block == "intent":
            return self._extended(block, intent_schema(content, seed))
        if block == "outcome":
            focus = cast("list[str]", (state.read("intent.focus") or []) if state else [])
            return self._extended(block, outcome_schema(content, seed, focus))
        return self.state_schema.json_schema(block)

    def _extended(self, block: str, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema that also asks for the fields that this world adds to the block."""
        extra = self.state_schema.extra.get(block)
        if not extra:
            return schema
        if "anyOf" in schema:
            return {**schema, "anyOf": [self._extended(block, form) for form in schema["anyOf"]]}
        properties, required = {**schema["properties"], **extra}, [*schema["required"], *extra]
        return {**schema, "properties": properties, "required": required}

    def _state(self, blocks: Mapping[Any, Any]) -> State:
        return State.of(blocks, schema=self.state_schema)

    # ---- training ----------------------------------------------------------------------------------------------------

    def places(self) -> Mapping[str, Node[Stage]]:
        for name, stage in self.stages.items():
            if name not in self._places or self._places[name].child is not stage:
                self._places[name] = Node(name, stage)
        return {name: self._places[name] for name in self.stages}

    def opened(self, node: Node[Stage], options: RunOptions, parent: Frame | None) -> Frame:
        chosen = replace(options, training=options.training and node.trainable, blobs=options.blobs or self.store.blobs)
        frame = Frame("world", self.world_id, chosen, parent)
        frame.node_id = node.node_id
        return frame

    def options_below(self, node: Node[Stage], frame: Frame) -> RunOptions:
        return frame.options

    def adapters_on(self, node: Node[Stage]) -> frozenset[int]:
        return frozenset()

    def rehearse(self, inputs: Mapping[Any, Any], **options: Any) -> dict[str, Any]:
        """Run stages as a step would, outside any step: `{stage: its inputs}` in, captured values out; nothing is kept.

        Raises: NodeError for an unknown stage, UnexpectedInputError for what cannot be captured.
        """
        captured: dict[str, Any] = {}
        for role, given in inputs.items():
            if role not in self.stages:
                raise NodeError(f"world {self.world_id!r} has no stage {role!r}; {did_you_mean(role, self.stages)}")
            stage = self.stages[role]
            with self._calling(role, RunOptions(**options)) as frame, stage.modes_for(frame.options.training):
                stage.run(given)
            captured.update(frame.captured)
        missing = [key for key in options.get("capture", ()) if key not in captured]
        if missing:
            raise UnexpectedInputError(
                f"{self.world_id}: nothing to capture at {missing[0]!r}; {did_you_mean(missing[0], captured)}"
            )
        return captured

    @contextmanager
    def _calling(self, role: str, options: RunOptions) -> Generator[Frame]:
        """The frame in which the world calls a stage."""
        frame = self.opened(self.places()[role], options, None)
        token = FRAME.set(frame)
        try:
            yield frame
        finally:
            FRAME.reset(token)

    def __repr__(self) -> str:
        return f"<World {self.world_id}>"


def _stage_hash(stage: Stage) -> str:
    """The stage's hash; one built in code from unregistered blocks is known by their classes and configs alone."""
    try:
        return stage.config_hash
    except ConfigError:
        blocks = [[path, type(b).__module__, type(b).__qualname__, b.config] for path, b in stage.block_paths()]
        return f"code:{sha256_json(blocks)}"

"""World: the cycle that lives by itself, step by step, from snapshot to snapshot."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from wg_core.assembly.build import Build
from wg_core.assembly.models import CANONICAL, UPDATE, WorldEntry
from wg_core.errors import (
    ConfigError,
    NodeError,
    OutputContractError,
    ReplayError,
    SnapshotConflictError,
    UnexpectedInputError,
    WGError,
    did_you_mean,
)
from wg_core.execution.block import Block
from wg_core.execution.budget import checked_limits
from wg_core.execution.calls import CallLog
from wg_core.execution.context import (
    FRAME,
    Event,
    Frame,
    Hook,
    RunOptions,
    add_rows,
    derive_seed,
    drained,
    hears,
    whole,
)
from wg_core.execution.drawing import Drawing, draw_cycle
from wg_core.execution.drive import Stepping, drive
from wg_core.execution.node import Node
from wg_core.execution.validate import ValidationResult
from wg_core.levels.end_world import EndWorld, end_world_folders, find_end_world, linked_end_worlds
from wg_core.levels.example import example_state
from wg_core.levels.flow import Flow, step_budget, with_budget
from wg_core.levels.replay import Replay, read_calls, replay
from wg_core.levels.stage import Stage, why_not
from wg_core.levels.training import Trained
from wg_core.levels.world_checks import world_issues
from wg_core.levels.written import Written
from wg_core.state.canonical import canonical_bytes, sha256_json
from wg_core.state.content import WorldContent, WorldView, apply
from wg_core.state.forms import DEFAULT_SCHEMA
from wg_core.state.home import home
from wg_core.state.schemas import intent_schema, offered, outcome_schema
from wg_core.state.state import BLOCKS, State, StateSchema
from wg_core.state.store import Snapshot, SnapshotStore, StageRecord
from wg_core.state.upkeep import GRACE_S, Removed
from wg_core.structure.ids import check_id

ROLES = CANONICAL
_log = logging.getLogger("wg_core.world")


class World(Trained, Written):
    """Philosopher -> Author -> World update -> Development -> Architect -> Creator, and again.

    A world may also be built piece by piece (`add_stage`, `set_cycle`, ...); `validate` says what it lacks.
    """

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
        return tuple(self._cycle) if self._cycle is not None else ROLES

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
    def from_entry(cls, entry: WorldEntry, build: Build) -> World:
        if entry.execution.base is not None:
            from wg_core.levels.lora_world import LoraWorld

            return LoraWorld.from_entry(entry, build)
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

    # ---- the seam: begin, run_stage, commit ------------------------------------------------------------------------

    def begin(
        self,
        *,
        state: State | Mapping[Any, Any] | None = None,
        action: str | None = None,
        seed: int | None = None,
        parent: Snapshot | None = None,
        owner: str | None = None,
        budget: Mapping[str, Any] | None = None,
    ) -> Flow:
        """Begin the step after the head: take the world's lease, the carried (or given) state and a seed.

        Limits of `budget` (`{calls, tokens, cost}`) replace those of the world's file.

        Raises: SnapshotConflictError if `parent` is not the head or another owner holds the world, ConfigError for a
        world that lacks stages.
        """
        self._must_be_whole()
        limits = checked_limits({**cast("dict[str, Any]", self._execution.get("budget") or {}), **(budget or {})})
        owner = owner or default_owner()
        epoch = self.store.acquire(self.world_id, owner)
        try:
            head = self.store.head(self.world_id)
            if parent is not None and (head is None or head.id != parent.id):
                raise SnapshotConflictError(
                    f"world {self.world_id!r} is at step {head.step if head else 'none'}, not at the given step {parent.step}; "
                    f"to go on from there: wg fork {self.world_id}@{parent.step} NEW_NAME"
                )
            carried = head.carried if head is not None else {}
            given = self._state(carried if state is None else state.to_json() if isinstance(state, State) else state)
            step = head.step + 1 if head is not None else 0
            content_seed = self.initial_content.save(self.store.blobs)
            if head is not None and head.content_seed not in (None, content_seed):
                _log.warning(
                    "world %r: the content in its file was edited after step 0; it is not read again. "
                    "To begin with it: wg fork, or a new world id",
                    self.world_id,
                )
            chosen = seed if seed is not None else self.seed
            return Flow(
                world_id=self.world_id,
                step=step,
                parent=head.id if head is not None else None,
                epoch=epoch,
                owner=owner,
                given=given.to_json(),
                state=given.to_json(),
                content=head.content if head is not None else content_seed,
                content_seed=content_seed,
                budget=limits,
                action=action,
                seed=chosen if chosen is not None else secrets.randbits(63),
                config_hash=self.config_hash,
                started=time.time(),
            )
        except BaseException:
            self.store.release(self.world_id, owner, epoch)
            raise

    def beginning_of(self, was: Snapshot, *, owner: str = "replay", epoch: int = 0) -> Flow:
        """The flow with which a published step began, to run it again as it was.

        Raises: ReplayError for the first step of a fork, and where the step before is not there.
        """
        if was.origin is not None:
            raise ReplayError(
                f"step {was.step} of {self.world_id!r} is that of {was.origin.world!r}, which it was forked from; "
                f"replay it there: wg replay {was.origin.world}@{was.origin.step}"
            )
        content = was.content_seed
        if was.parent is not None:
            try:
                content = self.store.get(self.world_id, was.step - 1).content
            except ConfigError as error:
                raise ReplayError(f"step {was.step} of {self.world_id!r} cannot be replayed: {error}") from error
        if content is None:
            raise ReplayError(f"step {was.step} of {self.world_id!r} does not say which content it began with")
        return Flow(
            world_id=self.world_id,
            step=was.step,
            parent=was.parent,
            epoch=epoch,
            owner=owner,
            given=was.given,
            state=was.given,
            content=content,
            content_seed=was.content_seed or content,
            action=was.action,
            seed=was.seed,
            config_hash=self.config_hash,
            started=time.time(),
        )

    def run_stage(
        self, role: str, flow: Flow, *, hooks: Sequence[Hook] = (), options: Mapping[str, Any] | None = None
    ) -> Flow:
        """Run one stage (or World update) of the step; a result that was journaled before a crash is taken over.

        Raises: NodeExecutionError, OutputContractError, and NodeError for an unknown role.
        """
        node, chosen = self.places().get(role), options or {}
        training = bool(chosen.get("training"))
        with nullcontext() if node is None else node.child.modes_for(training and node.trainable):
            return drive(self.driven(role), self.stage_session(role, flow, hooks, chosen), False)

    def driven(self, role: str) -> Stage:
        """What a driver of `stage_session` needs; World update has no stage, and its session no call."""
        return cast(Stage, self.stages.get(role))

    def stage_session(
        self, role: str, flow: Flow, hooks: Sequence[Hook], options: Mapping[str, Any]
    ) -> Stepping[Flow]:
        """`run_stage` as a session for a driver, which sets the modes of the blocks."""
        if role not in self._next:
            raise NodeError(f"world {self.world_id!r} has no stage {role!r}; {did_you_mean(role, self._next)}")
        if flow.state and self._next.get(UPDATE) == role and role != UPDATE:
            flow = flow.model_copy(update={"state": {}})
        all_hooks = (*self.hooks, *hooks)
        started, before = time.perf_counter(), {"state": flow.state}
        begun = Event("stage_start", f"{self.world_id}/{role}", "world", role, inputs=before, data={"step": flow.step})
        _tell(all_hooks, begun)
        key = self._journal_key(role, flow)
        known = self.store.journal_get(self.world_id, key)
        if known is not None:
            after = flow.model_copy(
                update={**known["flow"], "stages": [*flow.stages, StageRecord.model_validate(known["record"])]}
            )
        else:
            if role == UPDATE:
                after = self._update(flow)
            else:
                after = yield from self._run_stage(role, flow, all_hooks, options)
            record = after.stages[-1]
            if record.ran:
                changed = after.model_dump(mode="json", include={"state", "content", "applied", "dropped", "calls"})
                self.store.journal_put(self.world_id, key, {"flow": changed, "record": record.model_dump(mode="json")})
        data = {"step": flow.step, "resumed": known is not None, **after.stages[-1].model_dump(mode="json")}
        elapsed = time.perf_counter() - started
        done = Event(
            "stage_end", f"{self.world_id}/{role}", "world", role, inputs=before, outputs={"state": after.state},
            elapsed=elapsed, data=data,
        )  # fmt: skip
        _tell(all_hooks, done)
        return after

    def commit(self, flow: Flow, *, hooks: Sequence[Hook] = (), run: Mapping[str, Any] | None = None) -> Snapshot:
        """Publish the step as the next snapshot and give the lease back.

        `run` is kept beside the snapshot without being part of its identity (run ids, urls). Raises:
        SnapshotConflictError, StaleOwnerError.
        """
        made = {"created_at": time.time(), "seconds": time.time() - flow.started, "host": socket.gethostname()}
        snapshot = self._snapshot(flow, {**made, **({"calls": flow.calls} if flow.calls else {}), **(run or {})})
        try:
            published = self.store.publish(snapshot, epoch=flow.epoch)
        finally:
            self.store.release(self.world_id, flow.owner, flow.epoch)
        self.store.journal_clear(self.world_id, flow.step)
        _tell(
            (*self.hooks, *hooks),
            Event("snapshot", self.world_id, "world", data={"step": flow.step, "id": published.id}),
        )
        return published

    def _snapshot(self, flow: Flow, run: Mapping[str, Any]) -> Snapshot:
        done = tuple(r.role for r in flow.stages)
        if done != self.cycle:
            raise OutputContractError(
                f"step {flow.step} of {self.world_id!r} is not complete: stages run so far: {', '.join(done) or 'none'}"
            )
        return Snapshot(
            world_id=self.world_id,
            step=flow.step,
            parent=flow.parent,
            given=flow.given,
            applied=flow.applied,
            dropped=flow.dropped,
            carried=flow.state,
            content=flow.content,
            content_seed=flow.content_seed,
            stages=flow.stages,
            config_hash=flow.config_hash,
            models=self.models(),
            seed=flow.seed,
            action=flow.action,
            run=dict(run),
        )

    def abandon(self, flow: Flow) -> None:
        """Give the lease of a failed step back; journaled stage results stay for the next try."""
        self.store.release(self.world_id, flow.owner, flow.epoch)

    # ---- stepping ----------------------------------------------------------------------------------------------------

    def step(
        self,
        snapshot: Snapshot | None = None,
        *,
        action: str | None = None,
        state: State | Mapping[Any, Any] | None = None,
        seed: int | None = None,
        hooks: Sequence[Hook] = (),
        **options: Any,
    ) -> Snapshot:
        """One pass through the cycle, from the head (or from nothing) to a new snapshot.

        `action` reaches Development; a given `state` replaces the carried one; `options` are run options. What a
        failed step spent on stages that came to their end is not lost: they are taken over at the next try.

        Raises: SnapshotConflictError if `snapshot` is not the head, and what the stages raise.
        """
        options = with_budget(options)

        def alone(role: str, flow: Flow) -> Generator[Any, Any, Flow]:
            return whole(lambda: self.run_stage(role, flow, hooks=hooks, options=options))

        return drained(self.stepping(alone, hooks, state=state, action=action, seed=seed, parent=snapshot))

    def stepping(
        self, run: Callable[[str, Flow], Generator[Any, Any, Flow]], hooks: Sequence[Hook], **beginning: Any
    ) -> Generator[Any, Any, Snapshot]:
        """A step in which `run` runs each stage, and may pause; a step that fails or is closed gives the lease back."""
        flow = self.begin(**beginning)
        try:
            for role in self.cycle:
                flow = yield from run(role, flow)
        except BaseException:
            self.abandon(flow)
            raise
        return self.commit(flow, hooks=hooks)

    def evolve(
        self, n: int, *, action: str | None = None, seed: int | None = None, hooks: Sequence[Hook] = (), **options: Any
    ) -> Iterator[Snapshot]:
        """`n` steps, each snapshot as it is published; `action` is for the first, a `budget` for all together."""
        options = with_budget(options)
        for i in range(n):
            yield self.step(action=action if i == 0 else None, seed=seed, hooks=hooks, **options)

    def run(
        self,
        state: State | Mapping[Any, Any] | None = None,
        *,
        action: str | None = None,
        num_steps: int = 1,
        **more: Any,
    ) -> Snapshot:
        """`num_steps` steps; gives the last snapshot. Raises: ConfigError for fewer than one step."""
        more = with_budget(more)
        if num_steps < 1:
            raise ConfigError(f"num_steps is {num_steps}; a run has at least one step")
        snapshot = self.step(action=action, state=state, **more)
        for _ in range(num_steps - 1):
            snapshot = self.step(snapshot, **more)
        return snapshot

    def dry_run(self) -> dict[str, dict[str, Any]]:
        """Walk the whole cycle with placeholders: every mapping and contract is checked, no model is touched."""
        self.validate(deep=True)
        return {role: stage.dry_run() for role, stage in self.stages.items()}

    def due(self, state: State | None = None) -> dict[str, bool]:
        """Which stages will run in the next step, by their contracts: on the carried state, or a given one.

        Of conditions on fields it sees the blocks only.
        """
        head = self.store.head(self.world_id) if state is None else None
        given = state if state is not None else self._state(head.carried if head is not None else {})
        filled, runs = set(given.filled_names()), dict[str, bool]()
        for name in self.cycle:
            if self._next.get(UPDATE) == name:
                filled = set[str]()
            stage = self.stages.get(name)
            reads, writes = (stage.reads, stage.writes) if stage is not None else (BLOCKS, ())
            more = stage.execution_condition if stage is not None else {}
            needed = {*reads, *(path.partition(".")[0] for path in more.get("filled", ()))}
            runs[name] = filled >= needed and not filled & {*writes, *more.get("empty", ())}
            filled |= set(writes) if runs[name] else set()
        return runs

    def usage(self, step: int | None = None) -> dict[str, dict[str, float]]:
        """Model use of a step, or of all steps together: `{model: {calls, prompt_tokens, completion_tokens, cost?}}`."""
        total: dict[str, dict[str, float]] = {}
        for snapshot in self.history() if step is None else [self.store.get(self.world_id, step)]:
            add_rows(total, snapshot.usage())
        return total

    def load_last_snapshot(self) -> Snapshot | None:
        """The last published step, None before the first."""
        return self.store.head(self.world_id)

    def fork(self, new_id: str, step: int | None = None) -> World:
        """A new world in the same store that begins with a step of this one (by default the last), with its config.

        Raises: ConfigError if there is no such step, SnapshotConflictError if `new_id` has a history.
        """
        self.store.fork(self.world_id, self._published(step).step, new_id)
        forked = copy(self)
        forked.world_id = new_id
        forked.stages, forked._execution, forked.hooks = dict(self.stages), dict(self._execution), list(self.hooks)
        forked._places = {name: copy(node) for name, node in self.places().items()}
        return forked

    def diff(self, a: int, b: int) -> list[dict[str, Any]]:
        """The JSON Patch (RFC 6902) from what step `a` left to what step `b` left: states and content."""
        return self.store.diff(self.store.get(self.world_id, a), self.store.get(self.world_id, b))

    def verify(self) -> list[str]:
        """Every fault of this world's history; none if it is whole."""
        return self.store.verify(self.world_id)

    def gc(self, *, max_snapshots: int | None = None, dry_run: bool = False, grace_s: float = GRACE_S) -> Removed:
        """Remove blobs of the store that nothing names, and with `max_snapshots` the oldest steps of this world."""
        return self.store.gc(self.world_id, max_snapshots=max_snapshots, dry_run=dry_run, grace_s=grace_s)

    def _published(self, step: int | None) -> Snapshot:
        found = self.store.head(self.world_id) if step is None else self.store.get(self.world_id, step)
        if found is None:
            raise ConfigError(f"world {self.world_id!r} has no snapshot yet; make one: wg run {self.world_id}")
        return found

    def calls(self, snapshot: Snapshot) -> dict[str, list[dict[str, Any]]]:
        """The model calls of a step by stage: `{place, model, request, answer, usage, ...}`."""
        return read_calls(self.store, snapshot)

    def replay(self, step: int | None = None, *, hooks: Sequence[Hook] = ()) -> Replay:
        """Run a published step (by default the last) again from its recorded calls, asking no model; nothing is kept.

        Raises: ReplayError where the step before is not there, or a request is not in the record.
        """
        return replay(self, self._published(step), hooks)

    def history(self) -> list[Snapshot]:
        """All published snapshots, oldest first."""
        return self.store.history(self.world_id)

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

    # ---- inside a step -----------------------------------------------------------------------------------------------

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

    def _run_stage(
        self, role: str, flow: Flow, hooks: Sequence[Hook], options: Mapping[str, Any]
    ) -> Stepping[Flow]:
        stage = self.stages[role]
        content, state = self.content(flow.content), self._state(flow.state)
        step_seed, calls = derive_seed(flow.seed, flow.step), CallLog()
        settings: dict[str, Any] = {
            "seed": step_seed,
            "callbacks": tuple(hooks),
            "blobs": self.store.blobs,
            "calls": calls,
            **options,
            "budget": step_budget(flow, options.get("budget")),
        }
        settings["extra"] = {"step": flow.step, **cast("dict[str, Any]", options.get("extra") or {})}
        with self._calling(role, RunOptions(**settings)):
            schema = self.schema_for(stage.writes[0], content, state, seed=step_seed)
            sources = {"world": self._view(content), "action": flow.action, "schema": schema}
            result = yield from stage.stepping(state, sources, {})[0]
        record = StageRecord(
            role=role,
            ran=result.ran,
            reason=result.reason,
            seconds=result.seconds,
            usage={m: dict(row) for m, row in result.usage.items()},
            read=list(stage.reads) if result.ran else [],
            wrote=list(stage.writes) if result.ran else [],
        )
        made: dict[str, Any] = {"state": result.state.to_json(), "stages": [*flow.stages, record]}
        if calls.calls:
            kept = self.store.blobs.put(canonical_bytes({"calls": calls.calls, "schema_version": "1.0"}))
            made["calls"] = {**flow.calls, role: kept}
        return flow.model_copy(update=made)

    @contextmanager
    def _calling(self, role: str, options: RunOptions) -> Generator[Frame]:
        """The frame in which the world calls a stage."""
        frame = self.opened(self.places()[role], options, None)
        token = FRAME.set(frame)
        try:
            yield frame
        finally:
            FRAME.reset(token)

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

    def _update(self, flow: Flow) -> Flow:
        """World update: a full state goes into the content; any other is dropped, and said so."""
        state = self._state(flow.state)
        reason = why_not(state, BLOCKS, ())
        started = time.perf_counter()
        update: dict[str, Any] = {}
        if reason:
            update["dropped"] = list(state.filled_names())
            if update["dropped"]:
                reason += f"; the state is dropped: {', '.join(update['dropped'])}"
                _log.warning("world %r step %d: %s", self.world_id, flow.step, reason)
        else:
            after = apply(self.content(flow.content), state, step=flow.step, made_by=f"{self.world_id}/world_update")
            self._reading = (after.save(self.store.blobs), after)
            update = {"content": self._reading[0], "applied": flow.state}
        record = StageRecord(
            role="world_update",
            ran=not reason,
            reason=reason,
            seconds=time.perf_counter() - started if not reason else 0.0,
            usage={},
            read=[] if reason else list(BLOCKS),
            wrote=[] if reason else ["content"],
        )
        return flow.model_copy(update={**update, "stages": [*flow.stages, record]})

    def _journal_key(self, role: str, flow: Flow) -> str:
        return sha256_json(
            {
                "world": flow.world_id, "step": flow.step, "parent": flow.parent, "role": role, "state": flow.state,
                "content": flow.content, "action": flow.action, "seed": flow.seed, "config": flow.config_hash,
            }
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<World {self.world_id}>"


def _stage_hash(stage: Stage) -> str:
    """The stage's hash; one built in code from unregistered blocks is known by their classes and configs alone."""
    try:
        return stage.config_hash
    except ConfigError:
        blocks = [[path, type(b).__module__, type(b).__qualname__, b.config] for path, b in stage.block_paths()]
        return f"code:{sha256_json(blocks)}"


def default_owner() -> str:
    """How this process signs a lease."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _tell(hooks: Sequence[Hook], event: Event) -> None:
    for hook in (h for h in hooks if hears(h, event.kind)):
        try:
            hook(event)
        except WGError:
            raise
        except Exception:
            _log.exception("hook %r failed on %s at %s; the step goes on", hook, event.kind, event.path)

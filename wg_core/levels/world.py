"""World: the cycle that lives by itself, step by step, from snapshot to snapshot."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict

from wg_core.assembly.build import Build
from wg_core.assembly.models import WorldEntry
from wg_core.errors import ConfigError, NodeError, OutputContractError, SnapshotConflictError, WGError, did_you_mean
from wg_core.execution.block import Block
from wg_core.execution.context import FRAME, Event, Frame, Hook, RunOptions, derive_seed
from wg_core.levels.level import Written
from wg_core.levels.stage import CONTRACTS, Stage, StageResult, why_not
from wg_core.state.canonical import sha256_json
from wg_core.state.content import WorldContent, apply
from wg_core.state.home import home
from wg_core.state.schemas import intent_schema, offered, outcome_schema
from wg_core.state.state import BLOCKS, State, block_name, block_schema
from wg_core.state.store import Snapshot, SnapshotStore, StageRecord

ROLES = ("philosopher", "author", "world_update", "development", "architect", "creator")
_log = logging.getLogger("wg_core.world")


class Flow(BaseModel):
    """A step on its way: plain JSON, so that each stage may run in another process.

    `content` is the root hash of the content after the stages so far; `given` the state that the step began with,
    `applied` the full state that World update took in, `dropped` the blocks of a state that was not full.
    """

    model_config = ConfigDict(extra="forbid")

    world_id: str
    step: int
    parent: str | None
    epoch: int
    owner: str
    given: dict[str, Any]
    state: dict[str, Any]
    applied: dict[str, Any] | None = None
    dropped: list[str] = []
    content: str
    content_seed: str
    stages: list[StageRecord] = []
    action: str | None = None
    seed: int
    config_hash: str
    started: float


class World(Written):
    """Philosopher -> Author -> World update -> Development -> Architect -> Creator, and again."""

    level = kind = "world"

    def __init__(
        self,
        world_id: str,
        stages: Mapping[str, Stage],
        *,
        title: str | None = None,
        tags: Sequence[str] = (),
        content: Mapping[str, Any] | None = None,
        execution: Mapping[str, Any] | None = None,
        store: SnapshotStore | None = None,
        seed: int | None = None,
    ) -> None:
        missing = [r for r in ROLES if r != "world_update" and r not in stages]
        if missing:
            raise ConfigError(f"world {world_id!r} lacks the stages {', '.join(missing)}; the cycle needs all five")
        self.world_id = world_id
        self.title = title or world_id
        self.tags = list(tags)
        self.stages = {r: stages[r] for r in ROLES if r in stages}
        self.seed = seed
        self.store = store if store is not None else SnapshotStore(home() / "snapshots")
        self.hooks: list[Hook] = []
        self._content_seed = dict(content or {})
        self._execution = dict(execution or {})
        self.initial_content = WorldContent.from_seed(self._content_seed)
        self._reading: tuple[str, WorldContent] | None = None

    # ---- configuration ---------------------------------------------------------------------------------------------

    @classmethod
    def from_entry(cls, entry: WorldEntry, build: Build) -> Self:
        build = Build(build.registry, build.pool, entry.execution.models, build.document, build.where)
        stages: dict[str, Stage] = {}
        for role, stage_entry in entry.execution.stages.items():
            here = build.at("execution", "stages", role)
            if stage_entry.role not in (None, role):
                raise here.error(
                    ConfigError(f"this stage stands under {role!r} but names the role {stage_entry.role!r}")
                )
            named = stage_entry.model_copy(update={"role": role, "id": stage_entry.id or role})
            stages[role] = Stage.from_entry(named, here)
        root = entry.execution.storage.root
        try:
            return cls(
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

    def to_config(self) -> dict[str, Any]:
        execution = {k: v for k, v in self._execution.items() if k != "stages"}
        stages: dict[str, Any] = {}
        for role, stage in self.stages.items():
            entry = stage.to_config()
            stages[role] = {
                k: v for k, v in entry.items() if k not in ("kind", "schema_version", "role") and (k, v) != ("id", role)
            }
        return {
            "kind": "world",
            "schema_version": "1.0",
            "world_id": self.world_id,
            "title": self.title,
            "tags": self.tags,
            "execution": {**execution, "stages": stages},
            "content": self._content_seed,
        }

    @property
    def config_hash(self) -> str:
        """Hash of everything that decides how this world runs."""
        return sha256_json(self.to_config()["execution"])

    def block_paths(self) -> Iterator[tuple[str, Block]]:
        for role, stage in self.stages.items():
            for path, block in stage.block_paths():
                yield f"{role}/{path}", block

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
    ) -> Flow:
        """Begin the step after the head: take the world's lease, the carried (or given) state and a seed.

        Raises: SnapshotConflictError if `parent` is not the head or another owner holds the world.
        """
        owner = owner or default_owner()
        epoch = self.store.acquire(self.world_id, owner)
        try:
            head = self.store.head(self.world_id)
            if parent is not None and (head is None or head.id != parent.id):
                raise SnapshotConflictError(
                    f"world {self.world_id!r} is at step {head.step if head else 'none'}, not at the given step {parent.step}; "
                    f"to go on from there: wg fork {self.world_id}@{parent.step} NEW_NAME"
                )
            carried = State.of(head.carried) if head is not None else State()
            given = carried if state is None else state if isinstance(state, State) else State.of(state)
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
                action=action,
                seed=chosen if chosen is not None else secrets.randbits(63),
                config_hash=self.config_hash,
                started=time.time(),
            )
        except BaseException:
            self.store.release(self.world_id, owner, epoch)
            raise

    def run_stage(
        self, role: str, flow: Flow, *, hooks: Sequence[Hook] = (), options: Mapping[str, Any] | None = None
    ) -> Flow:
        """Run one stage (or World update) of the step; a result that was journaled before a crash is taken over.

        Raises: NodeExecutionError, OutputContractError, and NodeError for an unknown role.
        """
        if role not in ROLES:
            raise NodeError(f"world {self.world_id!r} has no stage {role!r}; {did_you_mean(role, ROLES)}")
        if role == "development" and flow.state:
            flow = flow.model_copy(update={"state": {}})
        all_hooks = (*self.hooks, *hooks)
        started = time.perf_counter()
        _tell(all_hooks, Event("stage_start", f"{self.world_id}/{role}", "world", role, data={"step": flow.step}))
        key = self._journal_key(role, flow)
        known = self.store.journal_get(self.world_id, key)
        if known is not None:
            after = flow.model_copy(
                update={**known["flow"], "stages": [*flow.stages, StageRecord.model_validate(known["record"])]}
            )
        else:
            after = (
                self._update(flow) if role == "world_update" else self._run_stage(role, flow, all_hooks, options or {})
            )
            record = after.stages[-1]
            if record.ran:
                changed = after.model_dump(mode="json", include={"state", "content", "applied", "dropped"})
                self.store.journal_put(self.world_id, key, {"flow": changed, "record": record.model_dump(mode="json")})
        data = {"step": flow.step, "resumed": known is not None, **after.stages[-1].model_dump(mode="json")}
        elapsed = time.perf_counter() - started
        _tell(all_hooks, Event("stage_end", f"{self.world_id}/{role}", "world", role, elapsed=elapsed, data=data))
        return after

    def commit(self, flow: Flow, *, hooks: Sequence[Hook] = (), run: Mapping[str, Any] | None = None) -> Snapshot:
        """Publish the step as the next snapshot and give the lease back.

        `run` is kept beside the snapshot without being part of its identity (run ids, urls). Raises:
        SnapshotConflictError, StaleOwnerError.
        """
        done = [r.role for r in flow.stages]
        if done != list(ROLES):
            raise OutputContractError(
                f"step {flow.step} of {self.world_id!r} is not complete: stages run so far: {done or 'none'}"
            )
        snapshot = Snapshot(
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
            run={
                "created_at": time.time(),
                "seconds": time.time() - flow.started,
                "host": socket.gethostname(),
                **(run or {}),
            },
        )
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

        `action` reaches Development; a given `state` replaces the carried one; `options` are run options.

        Raises: SnapshotConflictError if `snapshot` is not the head, and what the stages raise.
        """
        flow = self.begin(state=state, action=action, seed=seed, parent=snapshot)
        try:
            for role in ROLES:
                flow = self.run_stage(role, flow, hooks=hooks, options=options)
        except BaseException:
            self.abandon(flow)
            raise
        return self.commit(flow, hooks=hooks)

    def evolve(
        self, n: int, *, action: str | None = None, seed: int | None = None, hooks: Sequence[Hook] = (), **options: Any
    ) -> Iterator[Snapshot]:
        """`n` steps, each snapshot as it is published; `action` is for the first."""
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
        if num_steps < 1:
            raise ConfigError(f"num_steps is {num_steps}; a run has at least one step")
        snapshot = self.step(action=action, state=state, **more)
        for _ in range(num_steps - 1):
            snapshot = self.step(snapshot, **more)
        return snapshot

    def dry_run(self) -> dict[str, dict[str, Any]]:
        """Walk the whole cycle with placeholders: every mapping and contract is checked, no model is touched."""
        for role, stage in self.stages.items():
            stage.validate(deep=True)
            if (stage.reads, stage.writes) != CONTRACTS[role]:
                raise ConfigError(
                    f"stage {role!r} reads {list(stage.reads)} and writes {list(stage.writes)}; in this cycle it reads "
                    f"{list(CONTRACTS[role][0])} and writes {list(CONTRACTS[role][1])}"
                )
        return {role: stage.dry_run() for role, stage in self.stages.items()}

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
            for maker in self.stages["creator"].iter_blocks():
                request_schema = getattr(maker, "request_schema", None)
                if request_schema is not None:
                    names = {kind: offered(content.ids(kind), seed) for kind in ("entity", "place", "term")}
                    return cast("Callable[..., dict[str, Any]]", request_schema)(names)
        if block == "intent":
            return intent_schema(content, seed)
        if block == "outcome":
            return outcome_schema(content, seed, (state.read("intent.focus") or []) if state else [])
        return block_schema(block)

    def _run_stage(self, role: str, flow: Flow, hooks: Sequence[Hook], options: Mapping[str, Any]) -> Flow:
        stage = self.stages[role]
        content, state = self.content(flow.content), State.of(flow.state)
        step_seed = derive_seed(flow.seed, flow.step)
        settings: dict[str, Any] = {
            "seed": step_seed,
            "callbacks": tuple(hooks),
            "blobs": self.store.blobs,
            **options,
        }
        chosen = RunOptions(**{**settings, "extra": {"step": flow.step, **(options.get("extra") or {})}})
        frame = Frame("world", self.world_id, chosen)
        frame.node_id = role
        token = FRAME.set(frame)
        try:
            result: StageResult = stage.step(
                state,
                world=content.view(),
                action=flow.action,
                schema=self.schema_for(stage.writes[0], content, state, seed=step_seed),
            )
        finally:
            FRAME.reset(token)
        record = StageRecord(
            role=role,
            ran=result.ran,
            reason=result.reason,
            seconds=result.seconds,
            usage={m: dict(row) for m, row in result.usage.items()},
            read=list(stage.reads) if result.ran else [],
            wrote=list(stage.writes) if result.ran else [],
        )
        return flow.model_copy(update={"state": result.state.to_json(), "stages": [*flow.stages, record]})

    def _update(self, flow: Flow) -> Flow:
        """World update: a full state goes into the content; any other is dropped, and said so."""
        state = State.of(flow.state)
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
            update = {"content": after.save(self.store.blobs), "applied": flow.state}
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


def default_owner() -> str:
    """How this process signs a lease."""
    return f"{socket.gethostname()}:{os.getpid()}"


def example_state(blocks: Sequence[int | str], put: Callable[[bytes], str]) -> State:
    """A valid state with just these blocks; its artifact is a small picture, stored through `put`."""
    sha = put(_small_png())
    picture = {"id": sha, "media_type": "image/png", "slot": "images", "uri": f"blob:{sha}", "width": 16, "height": 16}
    examples: dict[str, Any] = {
        "intent": {"text": "The harbour waits for the morning boats."},
        "generation_config": {"requests": [{"id": "r1", "slot": "images", "maker": "map", "params": {}}]},
        "artifacts": {"images": [picture]},
        "descriptions": {"items": [{"artifact_id": sha, "text": "A small blue square.", "facts": {"width": 16}}]},
        "outcome": {"narrative": "Someone painted the harbour wall blue.", "changes": []},
    }
    wanted = [block_name(b) for b in blocks]
    return State.of({b: examples[b] for b in BLOCKS if b in wanted})


def _small_png() -> bytes:
    """A blue square of 16 x 16 pixels (PNG, ISO/IEC 15948)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x2a\x5c\x8a" * 16) * 16
    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _tell(hooks: Sequence[Hook], event: Event) -> None:
    for hook in hooks:
        try:
            hook(event)
        except WGError:
            raise
        except Exception:
            _log.exception("hook %r failed on %s at %s; the step goes on", hook, event.kind, event.path)

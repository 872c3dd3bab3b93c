"""World: the cycle that lives by itself, step by step, from snapshot to snapshot."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any, cast

from wg_core.assembly.models import UPDATE
from wg_core.errors import (
    ConfigError,
    NodeError,
    OutputContractError,
    ReplayError,
    SnapshotConflictError,
    WGError,
    did_you_mean,
)
from wg_core.execution.budget import checked_limits
from wg_core.execution.calls import CallLog
from wg_core.execution.context import (
    Event,
    Hook,
    add_rows,
    derive_seed,
    drained,
    hears,
    whole,
)
from wg_core.execution.drive import Stepping, drive
from wg_core.levels.flow import Flow, step_budget, with_budget
from wg_core.levels.replay import Replay, read_calls, replay
from wg_core.levels.stage import Stage, why_not
from wg_core.levels.world_structure import WorldStructure
from wg_core.state.canonical import canonical_bytes, sha256_json
from wg_core.state.content import apply
from wg_core.state.state import BLOCKS, State
from wg_core.state.store import Snapshot, StageRecord
from wg_core.state.upkeep import GRACE_S, Removed
from wg_core.structure.port import kind_of

_log = logging.getLogger("wg_core.world")


class World(WorldStructure):
    """Philosopher -> Author -> World update -> Development -> Architect -> Creator, and again.

    A world may also be built piece by piece (`add_stage`, `set_cycle`, ...); `validate` says what it lacks.
    """

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
        world that lacks stages, an action that is no text, and a seed that is no whole number.
        """
        self._must_be_whole()
        if action is not None and not isinstance(cast(Any, action), str):
            raise ConfigError(f"world {self.world_id!r}: an action is a text, not {kind_of(action)}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(cast(Any, seed), int)):
            raise ConfigError(f"world {self.world_id!r}: a seed is a whole number, not {seed!r}")
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
            if state is not None and given.filled_names() and self._next.get(UPDATE) == self.cycle[0]:
                lost = ", ".join(given.filled_names())
                _log.warning("world %r: its cycle begins with an empty state; what was given is lost: %s", self.world_id, lost)
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

    # ---- inside a step -----------------------------------------------------------------------------------------------

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
        with self._calling(role, stage._chosen(settings)):
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

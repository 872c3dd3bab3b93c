"""Replay: a published step runs again from the model calls that were recorded with it, and asks no model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from wg_core.errors import CorruptSnapshotError, NodeExecutionError, ReplayError
from wg_core.execution.calls import CallLog
from wg_core.execution.context import Hook
from wg_core.state.blobs import OverBlobs
from wg_core.state.part import read_json
from wg_core.state.store import Snapshot, SnapshotStore

if TYPE_CHECKING:
    from wg_core.levels.world import World


@dataclass(frozen=True, slots=True)
class Replay:
    """A step that was run again from its recorded calls: whether it came to the same snapshot, and what differs."""

    world_id: str
    step: int
    recorded_id: str
    replayed_id: str
    calls: int
    unused_calls: int
    differs: dict[str, list[Any]]

    @property
    def same(self) -> bool:
        """Whether the very same snapshot came out."""
        return self.recorded_id == self.replayed_id


def read_calls(store: SnapshotStore, snapshot: Snapshot) -> dict[str, list[dict[str, Any]]]:
    """The model calls of a step by stage. Raises: CorruptSnapshotError."""
    found: dict[str, list[dict[str, Any]]] = {}
    for role, sha in snapshot.calls().items():
        record = read_json(store.blobs, sha, "record of calls")
        calls = cast("dict[str, Any]", record).get("calls") if isinstance(record, dict) else None
        if not isinstance(calls, list):
            raise CorruptSnapshotError(f"blob {sha} is no record of calls; restore it from a copy of the store")
        found[role] = cast("list[dict[str, Any]]", calls)
    return found


def replay(world: World, was: Snapshot, hooks: Sequence[Hook] = ()) -> Replay:
    """Run the step of `was` again in a store of its own, over the blobs of the world's, which stay as they are.

    Raises: ReplayError where the step before is not there, or a request is not in the record.
    """
    flow = world.beginning_of(was)
    recorded, scratch = world.calls(was), copy(world)
    logs = {role: CallLog(recorded.get(role, ())) for role in world.cycle}
    scratch.hooks = []
    with TemporaryDirectory(prefix="wg-replay-") as folder:
        scratch.store = SnapshotStore(folder)
        scratch.store.blobs = OverBlobs(folder, world.store.blobs)
        for role in world.cycle:
            try:
                flow = scratch.run_stage(role, flow, hooks=hooks, options={"calls": logs[role]})
            except NodeExecutionError as error:
                cause = _replay_cause(error)
                if cause is None:
                    raise
                raise cause from None
        again = scratch._snapshot(flow, {})
    if again.models.keys() == was.models.keys():  # no weight was touched: those of the record stand
        again = again.model_copy(update={"models": was.models})
    differs = {name: [before, now] for name, (before, now) in was.diff(again).items() if name != "stages"}
    ran = [{s.role: s.ran for s in snapshot.stages} for snapshot in (was, again)]
    return Replay(
        world.world_id, was.step, was.id, again.id,
        calls=sum(len(log.calls) for log in logs.values()),
        unused_calls=sum(log.unused for log in logs.values()),
        differs=differs if ran[0] == ran[1] else {**differs, "stages": list(ran)},
    )  # fmt: skip


def _replay_cause(error: BaseException) -> ReplayError | None:
    at: BaseException | None = error
    while at is not None and not isinstance(at, ReplayError):
        at = at.__cause__
    return at

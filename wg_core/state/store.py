"""The snapshot store: a folder of worlds, one manifest per step, blobs shared by all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from wg_core.errors import ConfigError, CorruptSnapshotError, SnapshotConflictError, WGError
from wg_core.state import lease as leases
from wg_core.state.blobs import FileBlobs
from wg_core.state.canonical import canonical_bytes, is_sha256, parse_json, sha256_json
from wg_core.state.chain import needed
from wg_core.state.content import WorldContent
from wg_core.state.files import TEMP_PREFIX, sync_folder, write_file
from wg_core.state.lease import DEFAULT_TTL_S, Lease
from wg_core.state.part import read_json
from wg_core.state.snapshot import Origin, Snapshot, StageRecord
from wg_core.state.upkeep import GRACE_S, Removed, gc, read_pruned
from wg_core.structure.ids import check_id, safe_path

__all__ = ["Lease", "Origin", "Snapshot", "SnapshotStore", "StageRecord"]

_MANIFEST = re.compile(r"([0-9]{6,})\.json")
_BLOBS = "blobs"


class SnapshotStore:
    """Snapshots of worlds under `root`: `WORLD/manifests/000000.json`, `WORLD/journal/`, and `blobs/`.

    A published step never changes. One owner writes a world at a time; any number may read.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        self.blobs = FileBlobs(self.root / _BLOBS)

    def __repr__(self) -> str:
        return f"SnapshotStore({str(self.root)!r})"

    # ---- reading -------------------------------------------------------------------------------------------------

    def worlds(self) -> list[str]:
        """The ids of the worlds that have a snapshot."""
        folders = sorted(self.root.glob("*/manifests"))
        return [f.parent.name for f in folders if f.parent.name != _BLOBS and self.steps(f.parent.name)]

    def steps(self, world_id: str) -> list[int]:
        """The published steps of a world, in order."""
        try:
            names = [path.name for path in self._manifests(world_id).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_MANIFEST.fullmatch, names) if match)

    def head(self, world_id: str) -> Snapshot | None:
        """The last snapshot of a world, None if it has none. Raises: CorruptSnapshotError."""
        steps = self.steps(world_id)
        return self.get(world_id, steps[-1]) if steps else None

    def get(self, world_id: str, step: int) -> Snapshot:
        """The snapshot of a step. Raises: ConfigError if there is none, CorruptSnapshotError."""
        path = self.manifest_path(world_id, step)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if step in read_pruned(self._world(world_id)):
                raise ConfigError(f"step {step} of world {world_id!r} was removed from its history") from None
            steps = self.steps(world_id)
            known = f"it has {steps[0]} to {steps[-1]}" if steps else "it has none yet"
            raise ConfigError(f"world {world_id!r} has no step {step}; {known}") from None
        try:
            value = parse_json(data)
            if not isinstance(value, dict) or canonical_bytes(value) != data:
                raise ValueError("it is not in the form that it was written in")
            snapshot = Snapshot.from_json(cast("dict[str, Any]", value))
            if (snapshot.world_id, snapshot.step) != (world_id, step):
                raise ValueError(f"it holds step {snapshot.step} of world {snapshot.world_id!r}")
        except ValueError as error:
            raise CorruptSnapshotError(f"{path} is corrupt: {error}; restore it from a copy of the store") from None
        return snapshot

    def history(self, world_id: str) -> list[Snapshot]:
        """All snapshots of a world, oldest first. Raises: CorruptSnapshotError, also for a broken chain."""
        found: list[Snapshot] = []
        pruned = read_pruned(self._world(world_id))
        for step in self.steps(world_id):
            snapshot = self.get(world_id, step)
            problem = _chain_problem(found[-1] if found else None, snapshot, pruned)
            if problem:
                raise CorruptSnapshotError(f"the history of world {world_id!r} is broken: {problem}")
            found.append(snapshot)
        return found

    def content(self, snapshot: Snapshot) -> WorldContent:
        """The content after a snapshot's step. Raises: CorruptSnapshotError."""
        return WorldContent.load(self.blobs, snapshot.content)

    # ---- writing -------------------------------------------------------------------------------------------------

    def publish(self, snapshot: Snapshot, *, epoch: int) -> Snapshot:
        """Publish the step after the head; its blobs are stored already. Gives the snapshot that is in the store.

        That is `snapshot` itself when it was published now, and another object when a snapshot with the same id was
        published at this step before (then nothing is written).
        Raises: StaleOwnerError if `epoch` is not the current one; SnapshotConflictError if the head is not the parent;
        CorruptSnapshotError if the content is not in the store.
        """
        world_id = snapshot.world_id
        folder = self._world(world_id)
        with leases.locked(folder):
            leases.check_epoch(folder, epoch)
            steps = self.steps(world_id)
            if snapshot.step in steps:
                published = self.get(world_id, snapshot.step)
                if published.id == snapshot.id:
                    return published
                raise SnapshotConflictError(
                    f"step {snapshot.step} of world {world_id!r} is published as {published.id[:12]} and never "
                    f"changes; for another course: {_fork_hint(world_id, snapshot.step)}"
                )
            head = self.get(world_id, steps[-1]) if steps else None
            problem = _chain_problem(head, snapshot)
            if problem:
                at = f"is at step {head.step} ({head.id[:12]})" if head is not None else "has no step yet"
                raise SnapshotConflictError(
                    f"world {world_id!r} {at}, so step {snapshot.step} cannot follow: {problem}; "
                    f"begin again from the head, or for another course: {_fork_hint(world_id, snapshot.step)}"
                )
            self._write(snapshot)
        return snapshot

    def fork(self, world_id: str, step: int, new_id: str) -> Snapshot:
        """A new world that begins with a step of another, at the same step number; no blob is copied.

        Raises: ConfigError if there is no such step, SnapshotConflictError if `new_id` has snapshots already.
        """
        source = self.get(world_id, step)
        origin = Origin(world=world_id, step=step, id=source.id)
        check_id(new_id, "world id")
        snapshot = source.model_copy(update={"world_id": new_id, "parent": None, "origin": origin})
        with leases.locked(self._world(new_id)):
            if self.steps(new_id):
                raise SnapshotConflictError(f"world {new_id!r} has a history already; choose another id for the fork")
            self._write(snapshot)
        return snapshot

    def _write(self, snapshot: Snapshot) -> None:
        if not self.blobs.has(snapshot.content):
            raise CorruptSnapshotError(
                f"step {snapshot.step}: its content {snapshot.content} is not in {self.blobs.root}; save it there first"
            )
        path = self.manifest_path(snapshot.world_id, snapshot.step)
        for stray in path.parent.glob(f"{TEMP_PREFIX}*"):  # of a killed run: under the lock nobody writes here
            stray.unlink(missing_ok=True)
        try:
            write_file(path, canonical_bytes(snapshot.to_json()), exclusive=True)
        except FileExistsError:
            raise SnapshotConflictError(
                f"step {snapshot.step} of world {snapshot.world_id!r} was published by another run meanwhile; "
                f"for another course: {_fork_hint(snapshot.world_id, snapshot.step)}"
            ) from None

    # ---- the lease -----------------------------------------------------------------------------------------------

    def acquire(self, world_id: str, owner: str, ttl_s: float = DEFAULT_TTL_S) -> int:
        """Take the right to write a world and give the owner's epoch; free from a dead owner, or when it expired.

        The same owner in the same process gets its own lease again. Raises: SnapshotConflictError while another lives.
        """
        return leases.acquire(self._world(world_id), owner, ttl_s)

    def renew(self, world_id: str, epoch: int, ttl_s: float = DEFAULT_TTL_S) -> None:
        """Prolong a lease. Raises: StaleOwnerError if it passed to another."""
        leases.renew(self._world(world_id), epoch, ttl_s)

    def release(self, world_id: str, owner: str, epoch: int) -> bool:
        """Give a lease back; False if it had passed to another already."""
        return leases.release(self._world(world_id), owner, epoch)

    def lease(self, world_id: str) -> Lease | None:
        """The last lease of a world, None before the first. Raises: CorruptSnapshotError."""
        return leases.read_lease(self._world(world_id))

    # ---- the journal of a step -----------------------------------------------------------------------------------

    def journal_put(self, world_id: str, key: str, record: dict[str, Any], *, step: int | None = None) -> None:
        """Keep a stage's result under `key` (a sha256) until its step (by default the next one) is cleared."""
        if step is None:
            steps = self.steps(world_id)
            step = steps[-1] + 1 if steps else 0
        value = {"key": _journal_key(key), "record": record}
        path = self._journal(world_id) / f"{step:06d}-{key}.json"
        write_file(path, canonical_bytes({**value, "sha256": sha256_json(value)}))

    def journal_get(self, world_id: str, key: str) -> dict[str, Any] | None:
        """The kept result, None if there is none. Raises: CorruptSnapshotError."""
        path = next(iter(sorted(self._journal(world_id).glob(f"*-{_journal_key(key)}.json"))), None)
        if path is None:
            return None
        data = path.read_bytes()
        try:
            value = cast("dict[str, Any]", parse_json(data))
            sha = value.pop("sha256")
            if sha != sha256_json(value) or value["key"] != key or canonical_bytes({**value, "sha256": sha}) != data:
                raise ValueError("its hash differs")
            return cast("dict[str, Any]", value["record"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptSnapshotError(f"{path} is corrupt ({error}); remove it and the stage will run again") from None

    def journal_clear(self, world_id: str, step: int) -> None:
        """Forget the results kept for `step` and before."""
        folder = self._journal(world_id)
        if not folder.is_dir():
            return
        for path in folder.glob("*.json"):
            if int(path.name.partition("-")[0]) <= step:
                path.unlink(missing_ok=True)
        sync_folder(folder)

    # ---- checking ------------------------------------------------------------------------------------------------

    def verify(self, world_id: str) -> list[str]:
        """Every fault of a world's history, none if it is whole: manifests, chain, contents, artifacts, lease.

        An artifact whose `uri` points elsewhere (`scheme://...`) is not looked for.
        """
        problems: list[str] = []
        checked: dict[str, str | None] = {}
        last: Snapshot | None = None
        roots: set[str] = set()
        try:
            pruned = read_pruned(self._world(world_id))
        except WGError as error:
            problems.append(str(error))
            pruned = {}
        for step in self.steps(world_id):
            try:
                snapshot = self.get(world_id, step)
            except WGError as error:
                problems.append(f"step {step}: {error}")
                last = None
                continue
            if last is not None or not problems:
                broken = _chain_problem(last, snapshot, pruned)
                problems += [f"step {step}: {broken}"] if broken else []
            last = snapshot
            faults = self._artifact_problems(snapshot.artifacts().values(), checked)
            for role, sha in sorted(snapshot.calls().items()):
                fault = _first_fault(sha, lambda sha=sha: read_json(self.blobs, sha, "record of calls"), checked)
                faults += [f"calls of {role}: {fault}"] if fault else []
            for root in (snapshot.content_seed, snapshot.content):
                if root is not None and root not in roots:
                    faults += self._content_problems(root, roots, checked)
                    roots.add(root)
            problems += [f"step {step}: {fault}" for fault in faults]
        try:
            self.lease(world_id)
        except WGError as error:
            problems.append(str(error))
        return problems

    def _artifact_problems(self, artifacts: Iterable[dict[str, Any]], checked: dict[str, str | None]) -> list[str]:
        faults: list[str] = []
        for artifact in artifacts:
            id, uri = str(artifact["id"]), str(artifact.get("uri", ""))
            if "://" not in uri and _first_fault(id, lambda id=id: self.blobs.get(id), checked):
                faults.append(f"artifact: {checked[id]}")
        return faults

    def _content_problems(self, root: str, roots: set[str], checked: dict[str, str | None]) -> list[str]:
        faults: list[str] = []
        try:
            for name, part in needed(self.blobs, root, roots):
                made = name.startswith("artifact:")
                fault = _first_fault(
                    part.hash(), lambda part=part, made=made: part.record("artifact") if made else part.value, checked
                )
                if fault:
                    faults.append(f"content: {name}: {fault}")
                elif made and checked[part.hash()] is None:
                    faults += self._artifact_problems([part.value["artifact"]], checked)
        except WGError as error:
            faults.append(f"content: {error}")
        return faults

    # ---- comparing and upkeep ----------------------------------------------------------------------------------------

    def document(self, snapshot: Snapshot) -> dict[str, Any]:
        """What a step left, as one JSON document: action, the states given, applied and carried, and the content."""
        return {
            "action": snapshot.action,
            "given": snapshot.given,
            "applied": snapshot.applied,
            "carried": snapshot.carried,
            "content": self.content(snapshot).to_json(),
        }

    def diff(self, a: Snapshot, b: Snapshot, *, other: SnapshotStore | None = None) -> list[dict[str, Any]]:
        """The JSON Patch (RFC 6902) from the document of `a` to that of `b`, which may lie in another store."""
        import jsonpatch

        first, second = (
            parse_json(canonical_bytes(store.document(s))) for store, s in ((self, a), (other or self, b))
        )  # in the order of keys that a stored document has
        patch = jsonpatch.make_patch(first, second)
        return list(patch)

    def gc(
        self,
        world_id: str | None = None,
        *,
        max_snapshots: int | None = None,
        grace_s: float = GRACE_S,
        dry_run: bool = False,
    ) -> Removed:
        """Remove unreferenced blobs, and with `max_snapshots` the oldest steps of a world; see `upkeep.gc`."""
        return gc(self, world_id, max_snapshots=max_snapshots, grace_s=grace_s, dry_run=dry_run)

    # ---- paths ---------------------------------------------------------------------------------------------------

    def _world(self, world_id: str) -> Path:
        if check_id(world_id, "world id") == _BLOBS:
            raise ConfigError(f"world id {_BLOBS!r} is the name of the store's own folder; choose another")
        return safe_path(self.root, world_id)

    def _manifests(self, world_id: str) -> Path:
        return self._world(world_id) / "manifests"

    def manifest_path(self, world_id: str, step: int) -> Path:
        """The file of a step, present or not."""
        if step < 0:
            raise ConfigError(f"step {step} is negative; the first step is 0")
        return self._manifests(world_id) / f"{step:06d}.json"

    def _journal(self, world_id: str) -> Path:
        return self._world(world_id) / "journal"


def _first_fault(sha: str, read: Callable[[], object], checked: dict[str, str | None]) -> str | None:
    """What is wrong with a blob when it is first read; None if it is whole or was spoken of before."""
    if sha in checked:
        return None
    try:
        read()
        checked[sha] = None
    except WGError as error:
        checked[sha] = str(error)
    return checked[sha]


def _chain_problem(last: Snapshot | None, snapshot: Snapshot, pruned: Mapping[int, str] | None = None) -> str | None:
    """Why `snapshot` cannot stand after `last`, None if it can; `pruned` are the ids of removed steps."""
    before = (pruned or {}).get(snapshot.step - 1)
    if before is not None and (last is None or last.step < snapshot.step - 1):
        named = snapshot.parent[:12] if snapshot.parent else "none"
        return None if snapshot.parent == before else f"its parent is {named}, not {before[:12]} of the removed step"
    if last is None:
        if snapshot.parent is not None:
            return f"its parent {snapshot.parent[:12]} is not there"
        if snapshot.step != 0 and snapshot.origin is None:
            return f"a world begins with step 0, not {snapshot.step}"
        return None
    if snapshot.step != last.step + 1:
        return f"the step after {last.step} is {last.step + 1}, not {snapshot.step}"
    if snapshot.parent != last.id:
        named = snapshot.parent[:12] if snapshot.parent else "none"
        return f"its parent is {named}, not {last.id[:12]} of step {last.step}"
    return None


def _fork_hint(world_id: str, step: int) -> str:
    return f"wg fork {world_id}@{max(step - 1, 0)} NEW_NAME"


def _journal_key(key: str) -> str:
    if not is_sha256(key):
        raise ConfigError(f"bad journal key {key[:80]!r}: a sha256 in hex is needed")
    return key

"""Upkeep of a store: which blobs are in use, removing the others, and thinning a long history."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wg_core.errors import ConfigError, CorruptSnapshotError
from wg_core.state import lease as leases
from wg_core.state.canonical import canonical_bytes, parse_json, sha256_json
from wg_core.state.chain import entry_of, is_link, needed
from wg_core.state.files import TEMP_PREFIX, sync_folder, write_file

if TYPE_CHECKING:
    from wg_core.state.blobs import FileBlobs
    from wg_core.state.store import SnapshotStore

GRACE_S = 3600.0
PRUNED = "pruned.json"
_HASH = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(slots=True)
class Removed:
    """What `gc` removed (or, in a dry run, would remove): steps, blobs, and the bytes of these blobs."""

    steps: list[int] = field(default_factory=list[int])
    blobs: int = 0
    bytes: int = 0
    kept_blobs: int = 0


def reachable(blobs: FileBlobs, documents: Iterable[bytes]) -> set[str]:
    """The blobs that JSON documents name, and those that these name, and so on: every sha256 that is stored counts.

    Of a content that is named, what it holds now counts, and its chronicle; not the records as they were before.
    Raises: CorruptSnapshotError for a blob whose bytes were altered.
    """
    found: set[str] = set()
    contents: list[str] = []

    def follow(waiting: list[str]) -> None:
        while waiting:
            sha = waiting.pop()
            if sha in found or not blobs.has(sha):
                continue
            found.add(sha)
            with open(blobs.path(sha), "rb") as file:
                is_json = file.read(1) in (b"{", b"[")
            data = blobs.get(sha) if is_json else b""
            if is_link(data):
                contents.append(sha)
            else:
                waiting += _named(data)

    follow([sha for document in documents for sha in _named(document)])
    known = set(contents)
    for root in contents:
        for _, part in needed(blobs, root, known):
            entry = entry_of(part)
            if entry is not None:  # a link: what it says of records that changed since is history
                found.add(part.hash())
            follow([part.hash()] if entry is None else _named(canonical_bytes(entry)))
    return found


def _named(document: bytes) -> list[str]:
    return [match.decode() for match in _HASH.findall(document)]


def read_pruned(folder: Path) -> dict[int, str]:
    """Step -> snapshot id of the steps that were removed from a world's history. Raises: CorruptSnapshotError."""
    path = folder / PRUNED
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        value = cast("dict[str, Any]", parse_json(data))
        if value.pop("sha256") != sha256_json(value):
            raise ValueError("its hash differs")
        return {int(step): str(id) for step, id in value["steps"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptSnapshotError(f"{path} is corrupt ({error}); restore it from a copy of the store") from None


def gc(
    store: SnapshotStore,
    world_id: str | None = None,
    *,
    max_snapshots: int | None = None,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
) -> Removed:
    """Remove blobs that no snapshot and no journal of the store names, if they are at least `grace_s` seconds old.

    With `max_snapshots` the history of `world_id` keeps its last so many steps and those that forks of it began from;
    the ids of removed steps are kept, so that the chain can still be verified. Nobody may write meanwhile.
    Raises: SnapshotConflictError while a world of the store is being written, CorruptSnapshotError.
    """
    if max_snapshots is not None and (max_snapshots < 1 or world_id is None):
        raise ConfigError(f"max_snapshots is at least 1 and needs a world; given {max_snapshots} for {world_id!r}")
    folders = [p for p in store.root.iterdir() if (p / "lock").exists()] if store.root.is_dir() else []
    owner = f"gc:{socket.gethostname()}:{os.getpid()}:{time.monotonic_ns()}"
    held: list[tuple[Path, int]] = []
    try:
        for folder in folders:
            held.append((folder, leases.acquire(folder, owner, leases.DEFAULT_TTL_S)))
        removed = Removed()
        if max_snapshots is not None and world_id is not None:
            removed.steps = _to_prune(store, world_id, max_snapshots)
            if not dry_run:
                _prune(store, world_id, removed.steps)
        gone = {store.manifest_path(world_id, step) for step in removed.steps} if world_id is not None else set[Path]()
        kept = [p for p in store.root.glob("*/manifests/*.json") if p not in gone]
        kept += store.root.glob("*/journal/*.json")
        used = reachable(store.blobs, (p.read_bytes() for p in kept))
        _sweep(store.blobs, used, removed, time.time() - grace_s, dry_run)
        return removed
    finally:
        for folder, epoch in held:
            leases.release(folder, owner, epoch)


def _to_prune(store: SnapshotStore, world_id: str, keep: int) -> list[int]:
    steps = store.steps(world_id)
    if not steps:
        raise ConfigError(f"world {world_id!r} has no snapshot; there is nothing to remove")
    forked = {
        origin.step
        for other in store.worlds()
        for origin in [store.get(other, store.steps(other)[0]).origin]
        if origin is not None and origin.world == world_id
    }
    return [step for step in steps[:-keep] if step not in forked]


def _prune(store: SnapshotStore, world_id: str, steps: list[int]) -> None:
    if not steps:
        return
    folder = store.manifest_path(world_id, 0).parent
    ids = read_pruned(folder.parent) | {step: store.get(world_id, step).id for step in steps}
    value = {"steps": {str(step): id for step, id in sorted(ids.items())}}
    write_file(folder.parent / PRUNED, canonical_bytes({**value, "sha256": sha256_json(value)}))
    for step in steps:
        store.manifest_path(world_id, step).unlink(missing_ok=True)
    sync_folder(folder)


def _sweep(blobs: FileBlobs, used: set[str], removed: Removed, before: float, dry_run: bool) -> None:
    for path in sorted([*blobs.root.glob("*/*/*"), *blobs.root.glob(f"{TEMP_PREFIX}*")]):
        if path.name in used:
            removed.kept_blobs += 1
            continue
        stat = path.stat()
        if stat.st_mtime > before:
            removed.kept_blobs += 0 if path.name.startswith(TEMP_PREFIX) else 1
            continue
        removed.blobs += 1
        removed.bytes += stat.st_size
        if not dry_run:
            blobs.forget(path.name) if not path.name.startswith(TEMP_PREFIX) else path.unlink(missing_ok=True)

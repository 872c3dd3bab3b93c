"""A world and its whole history as one archive, and back."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from wg_core.assembly.loader import dump_yaml
from wg_core.errors import ConfigError, CorruptSnapshotError, SnapshotConflictError
from wg_core.state import lease as leases
from wg_core.state.files import TEMP_PREFIX, make_folder, sync_folder
from wg_core.state.store import SnapshotStore
from wg_core.state.upkeep import PRUNED, reachable
from wg_core.weights.archive import pack_folder, unpack

if TYPE_CHECKING:
    from wg_core.levels.world import World

CONFIG, STORE = "world.yaml", "store"
_MEMBER = re.compile(
    rf"{re.escape(CONFIG)}|{STORE}/[A-Za-z_][A-Za-z0-9_]*/({re.escape(PRUNED)}|manifests/[0-9]{{6,}}\.json)"
    rf"|{STORE}/blobs/[0-9a-f]{{2}}/[0-9a-f]{{2}}/[0-9a-f]{{64}}"
)


def export_world(world: World, target: Path | str) -> Path:
    """Write a world's file, snapshots and all blobs that they name to one zip file.

    End Worlds that it links to, and models, are not in it. Raises: ConfigError for a world without a snapshot or a
    `target` that exists, CorruptSnapshotError.
    """
    store, steps, path = world.store, world.store.steps(world.world_id), Path(target)
    if path.exists():
        raise ConfigError(f"{path} exists; choose another name or remove it")
    if not steps:
        raise ConfigError(f"world {world.world_id!r} has no snapshot yet; its file is all there is to hand on")
    problems = store.verify(world.world_id)
    if problems:
        raise CorruptSnapshotError(f"world {world.world_id!r} is not whole, so it is not exported: {problems[0]}")
    folder = store.root / f"{TEMP_PREFIX}export-{token_hex(6)}"
    try:
        own = SnapshotStore(folder / STORE)
        manifests = [store.manifest_path(world.world_id, step) for step in steps]
        pruned = manifests[0].parent.parent / PRUNED
        for file in (*manifests, *([pruned] if pruned.is_file() else [])):
            _copy(file, own.root / file.relative_to(store.root))
        for sha in sorted(reachable(store.blobs, (file.read_bytes() for file in manifests))):
            _copy(store.blobs.path(sha), own.blobs.path(sha))
        config = world.to_config()
        config["execution"].pop("storage", None)
        dump_yaml(config, folder / CONFIG)
        make_folder(path.absolute().parent)
        pack_folder(folder, path.absolute())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def import_world(archive: Path | str, store: SnapshotStore, folder: Path | str) -> tuple[str, Path]:
    """Take in what `export_world` wrote: its history into `store`, its file into `folder`; gives world id and file.

    Every hash, the chain and the world's file are checked before anything is taken in.
    Raises: CheckpointError for an archive that is broken or unsafe, CorruptSnapshotError, ConfigError, and
    SnapshotConflictError if the store has a history of this world already.
    """
    make_folder(store.root)
    temp = store.root / f"{TEMP_PREFIX}import-{token_hex(6)}"
    try:
        unpack(Path(archive), temp)
        files = sorted(p for p in temp.rglob("*") if p.is_file())
        for path in files:
            if not _MEMBER.fullmatch(name := path.relative_to(temp).as_posix()):
                raise ConfigError(f"{archive} is no exported world: it holds {name!r}; nothing was taken in")
        own = SnapshotStore(temp / STORE)
        if len(own.worlds()) != 1 or not (temp / CONFIG).is_file():
            raise ConfigError(
                f"{archive} is no exported world: one history and {CONFIG} are needed, nothing was taken in"
            )
        world_id = own.worlds()[0]
        target = Path(folder) / f"{world_id}.yaml"
        if target.exists():
            raise ConfigError(f"{target} exists; move it away first, nothing was taken in")
        _check(own, world_id, temp / CONFIG, archive)
        _take_in(own, store, world_id)
        make_folder(target.absolute().parent)
        os.replace(temp / CONFIG, target)
        return world_id, target
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _check(own: SnapshotStore, world_id: str, config: Path, archive: Path | str) -> None:
    from wg_core.levels.world import World

    found = World.from_yaml(config).world_id
    if found != world_id:
        raise ConfigError(f"{archive}: its file is that of world {found!r}, its history that of {world_id!r}")
    problems = own.verify(world_id)
    if problems:
        raise CorruptSnapshotError(f"{archive} is corrupt, nothing was taken in: {problems[0]}")
    for step in own.steps(world_id):
        own.get(world_id, step)


def _take_in(own: SnapshotStore, store: SnapshotStore, world_id: str) -> None:
    """Blobs first, then the manifests by one rename: the history is there whole or not at all."""
    manifests = own.manifest_path(world_id, 0).parent
    for sha in sorted(reachable(own.blobs, (file.read_bytes() for file in manifests.iterdir()))):
        store.blobs.put(own.blobs.get(sha))
    target = store.manifest_path(world_id, 0).parent
    with leases.locked(target.parent):
        if store.steps(world_id):
            raise SnapshotConflictError(f"the store has a history of world {world_id!r} already; nothing was taken in")
        if (manifests.parent / PRUNED).is_file():
            os.replace(manifests.parent / PRUNED, target.parent / PRUNED)
        if target.is_dir():
            target.rmdir()
        os.rename(manifests, target)
        sync_folder(target.parent)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)

"""World files: where they are, and what Dagster needs to know of each before any run."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wg_core.errors import ConfigError, WGError, did_you_mean
from wg_core.structure.ids import check_id

log = logging.getLogger("wg_defs")

ROLES = ("philosopher", "author", "world_update", "development", "architect", "creator")
"""The canonical cycle, in the order in which a step runs it."""


BROKEN = "broken_worlds"
"""The group on the page that lists broken files."""


@dataclass(frozen=True)
class WorldFile:
    """One world file, read but not built."""

    path: str
    world_id: str
    title: str
    description: str
    roles: tuple[str, ...]
    code_version: str
    on_base: bool = False  # whether it is a LoRA world, which stands on another


@dataclass(frozen=True)
class BrokenFile:
    """A file that is not a world; `problem` names file, line and path."""

    path: str
    problem: str


def world_files(folders: Sequence[Path] | None = None) -> list[Path]:
    """The files `*.yaml` in `worlds/` and in every folder of `WG_WORLDS`, by name; an entry may also be one file."""
    if folders is None:
        named = os.environ.get("WG_WORLDS", "").split(os.pathsep)
        folders = [Path("worlds"), *(Path(name).expanduser() for name in named if name)]
    found: dict[Path, Path] = {}
    for folder in folders:
        files = [folder] if folder.is_file() else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_worlds(folders: Sequence[Path] | None = None) -> tuple[list[WorldFile], list[BrokenFile]]:
    """All worlds, and all files that are none; one broken file does not touch the others."""
    worlds: dict[str, WorldFile] = {}
    broken: list[BrokenFile] = []
    for path in world_files(folders):
        try:
            world = read_world(path)
        except (WGError, OSError) as error:
            broken.append(BrokenFile(str(path), str(error)))
            continue
        if world is None:
            continue
        if world.world_id in worlds:
            other = worlds[world.world_id].path
            problem = f"{path}: world_id: {world.world_id!r} is already the world of {other}; choose another id"
            broken.append(BrokenFile(str(path), problem))
            continue
        worlds[world.world_id] = world
    for file in broken:
        log.warning("left out a broken world file: %s", file.problem)
    return list(worlds.values()), broken


def read_world(path: Path) -> WorldFile | None:
    """Read one file with all that it refers to; None for an End World or another kind of file, which is never run.

    Raises: ConfigError with file, line and path.
    """
    from wg_core.assembly.loader import read

    document = read(path)
    data = document.data
    if not isinstance(data, Mapping):
        raise document.error((), "a world file is a mapping with world_id, execution and content")
    if data.get("kind", "world") != "world" or ("execution" not in data and "content" in data):
        return None
    try:
        world_id = check_id(data.get("world_id"), "world id")
    except WGError as error:
        raise document.error(("world_id",), str(error)) from None
    if world_id == BROKEN:
        raise document.error(("world_id",), f"{BROKEN!r} is where the page lists broken files; choose another id")
    execution, content = data.get("execution"), data.get("content")
    base = _below(_below(execution, "base"), "world")  # a LoRA world runs the cycle of its base
    cycle = _below(_below(base, "execution") if base else execution, "cycle")
    content = content if "content" in data else _below(base, "content")
    text = json.dumps(execution, sort_keys=True, ensure_ascii=False)
    return WorldFile(
        path=str(path.resolve()),
        world_id=world_id,
        title=str(data.get("title") or world_id),
        description=str(content.get("description") or "") if isinstance(content, Mapping) else "",
        roles=tuple(map(str, cycle)) if isinstance(cycle, list) else ROLES,
        code_version=hashlib.sha256(text.encode()).hexdigest()[:16],
        on_base=base is not None,
    )


def _below(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def world_file(name: str, folders: Sequence[Path] | None = None) -> WorldFile:
    """The world called `name`. Raises: ConfigError, with the known names."""
    worlds, broken = read_worlds(folders)
    for world in worlds:
        if world.world_id == name:
            return world
    for file in broken:
        if Path(file.path).stem == name:
            raise ConfigError(file.problem)
    raise ConfigError(f"no world {name!r} in worlds/ or WG_WORLDS; {did_you_mean(name, [w.world_id for w in worlds])}")

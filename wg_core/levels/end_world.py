"""End World: a world that is only read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar, NoReturn, Self, cast

from wg_core.assembly.build import Build
from wg_core.assembly.loader import dump_yaml, read
from wg_core.assembly.models import SCHEMA_VERSION, EndWorldEntry
from wg_core.errors import ConfigError, EndWorldError, WGError
from wg_core.levels.written import Written
from wg_core.state.blobs import FileBlobs
from wg_core.state.canonical import is_sha256
from wg_core.state.content import WorldContent, WorldView
from wg_core.state.files import TEMP_PREFIX, make_folder, sync_folder
from wg_core.state.upkeep import reachable
from wg_core.structure.ids import check_id

FILE = "end_world.yaml"
_BLOBS = "blobs"


class EndWorld(Written):
    """Content without execution: it can be read, linked and quoted, never run or written.

    A frozen world is a folder: `end_world.yaml`, which names the content's root hash, and `blobs/` with all its parts
    and artifacts. Every part is checked against its hash when it is read.
    """

    level: ClassVar[str] = "end_world"
    kind: ClassVar[str] = "end_world"
    world_id: str
    title: str
    tags: tuple[str, ...]
    content: WorldContent

    def __init__(
        self,
        world_id: str,
        content: Mapping[str, Any],
        *,
        title: str | None = None,
        tags: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        blobs, loaded = None, None
        if set(content) == {"root"}:
            root = content["root"]
            if folder is None or not is_sha256(root):
                raise ConfigError(
                    f"end world {world_id!r}: content.root is the sha256 of a content whose blobs lie beside the file, "
                    f"not {str(root)[:80]!r} in {folder or 'a text'}"
                )
            blobs = FileBlobs(folder / _BLOBS)
            loaded = WorldContent.load(blobs, root)
        given = {"world_id": check_id(world_id, "end world id"), "title": title or world_id, "tags": tuple(tags)}
        given |= {"content": loaded or WorldContent.from_seed(content), "_seed": dict(content), "_blobs": blobs}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise EndWorldError(f"end world {self.world_id!r} never changes; {name} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise EndWorldError(f"end world {self.world_id!r} never changes; {name} cannot be deleted")

    def view(self) -> WorldView:
        """A read-only view of the content."""
        return self.content.view()

    def verify(self) -> list[str]:
        """Every part and artifact whose bytes do not match their hash; none if the End World is whole."""
        problems: list[str] = []
        for name, part in self.content.parts():
            try:
                _ = part.value
            except WGError as error:
                problems.append(f"{name}: {error}")
        blobs = cast("FileBlobs | None", self.__dict__["_blobs"])
        if blobs is not None:
            for sha in self.content.artifact_ids:
                try:
                    blobs.get(sha)
                except WGError as error:
                    problems.append(f"artifact: {error}")
        return problems

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise EndWorldError(f"end world {self.world_id!r} is read, never run or written; link a world to it instead")

    step = run = evolve = begin = run_stage = commit = fork = _refuse
    save_checkpoint = load_from_checkpoint = cast(Any, _refuse)

    # ---- written down ----------------------------------------------------------------------------------------------

    @classmethod
    def from_entry(cls, entry: EndWorldEntry, build: Build) -> Self:
        source = Path(build.document.source)
        folder = source.parent if source.is_file() else None
        try:
            return cls(entry.world_id, entry.content, title=entry.title, tags=entry.tags, folder=folder)
        except ConfigError as error:
            raise build.at("content").error(error) from error

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": "end_world",
            "schema_version": SCHEMA_VERSION,
            "world_id": self.world_id,
            "title": self.title,
            "tags": list(self.tags),
            "content": dict(self.__dict__["_seed"]),
        }

    def save(self, folder: Path | str, **_: Any) -> Path:
        """Write the End World as a folder of its own. Raises: ConfigError if it exists."""
        blobs = cast("FileBlobs | None", self.__dict__["_blobs"])
        EndWorld.write(self.world_id, self.content, blobs, Path(folder), title=self.title, tags=self.tags)
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str, **_: Any) -> Self:
        """What `save` or `World.freeze` wrote. Raises: FileNotFoundError, ConfigError, CorruptSnapshotError."""
        return cls.from_yaml(Path(folder) / FILE)

    @staticmethod
    def write(
        world_id: str, content: WorldContent, blobs: FileBlobs | None, folder: Path, *, title: str, tags: Sequence[str]
    ) -> EndWorld:
        """Write a content, with its artifacts out of `blobs`, as a folder that is whole or absent.

        Raises: ConfigError if `folder` exists.
        """
        check_id(world_id, "end world id")
        if folder.exists():
            raise ConfigError(f"{folder} exists; an end world never changes, so give the new one its own id or folder")
        make_folder(folder.absolute().parent)
        temp = folder.absolute().parent / f"{TEMP_PREFIX}{token_hex(6)}"
        try:
            make_folder(temp)
            own = FileBlobs(temp / _BLOBS)
            root = content.save(own if blobs is None else blobs)
            if blobs is not None:
                for sha in sorted(reachable(blobs, [root.encode()])):
                    own.put(blobs.get(sha))
            head = {"kind": "end_world", "schema_version": SCHEMA_VERSION, "world_id": world_id, "title": title}
            file = dump_yaml({**head, "tags": list(tags), "content": {"root": root}}, temp / FILE)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.rename(temp, folder)
            sync_folder(folder.absolute().parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return EndWorld.load(folder)

    def __repr__(self) -> str:
        return f"<EndWorld {self.world_id}>"


def linked_end_worlds(links: Sequence[Any]) -> list[str]:
    """The ids of the End Worlds among the links of a content, in order and once."""
    found = [cast("dict[str, Any]", link) for link in links if isinstance(link, dict)]
    ids = [str(link["target_id"]) for link in found if link.get("target_kind") == "end_world" and "target_id" in link]
    return list(dict.fromkeys(ids))


def end_world_folders(folder: Path | None = None) -> list[Path]:
    """Where End Worlds are looked for: beside the world's file, in `worlds/` and in the folders of `WG_WORLDS`."""
    named = [Path(name).expanduser() for name in os.environ.get("WG_WORLDS", "").split(os.pathsep) if name]
    beside = [folder] if folder is not None else []
    return [f.parent if f.is_file() else f for f in (*beside, Path("worlds"), *named)]


def find_end_world(id: str, folders: Sequence[Path]) -> EndWorld | None:
    """The End World `id` in one of the folders: `ID/end_world.yaml`, or any YAML file that is this End World.

    Raises: ConfigError, CorruptSnapshotError for one that is found and broken.
    """
    check_id(id, "end world id")
    for folder in folders:
        files = [folder / id / FILE, *sorted([*folder.glob("*.yaml"), *folder.glob(f"*/{FILE}")])]
        for file in files:
            if not file.is_file() or "end_world" not in file.read_text(encoding="utf-8", errors="replace")[:4096]:
                continue
            data = cast("dict[str, Any]", read(file, refs=False).data)
            if (data.get("kind"), data.get("world_id")) == ("end_world", id):
                return EndWorld.from_yaml(file)
    return None

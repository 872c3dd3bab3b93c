"""The one door for archives: a folder as a zip file, and back without ever leaving the target folder."""

from __future__ import annotations

import os
import re
import secrets
import stat
import zipfile
import zlib
from pathlib import Path

from wg_core.errors import CheckpointError
from wg_core.state.files import TEMP_PREFIX, sync_folder
from wg_core.structure.ids import safe_path

MAX_MEMBERS = 100_000
MAX_RATIO = 20  # weights hardly shrink; a file that grows more than this on unpacking is a bomb
FREE_SIZE = 64 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def pack_folder(folder: Path, target: Path) -> None:
    """Write all files below `folder` to the zip file `target`, uncompressed; `target` is whole or as it was."""
    temp = target.parent / f"{TEMP_PREFIX}{secrets.token_hex(6)}"
    try:
        with open(temp, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    info = zipfile.ZipInfo(
                        path.relative_to(folder).as_posix()
                    )  # a fixed date: equal content, equal bytes
                    info.file_size = path.stat().st_size
                    with open(path, "rb") as source, archive.open(info, "w") as member:
                        while chunk := source.read(1 << 20):
                            member.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, target)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(target.parent)


def unpack(archive_path: Path, folder: Path) -> None:
    """Unpack a zip file into `folder`.

    Raises: CheckpointError for a broken file, names that leave the folder, links, names that occur twice, and sizes
    that grow beyond all measure; nothing is written before all names and sizes were checked.
    """
    try:
        with zipfile.ZipFile(archive_path) as archive:
            members = _checked(archive_path, archive.infolist())
            for info in members:
                target = safe_path(folder, *info.filename.split("/"))
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, open(target, "xb") as file:
                    left = info.file_size
                    while chunk := source.read(min(1 << 20, left + 1)):
                        left -= len(chunk)
                        if left < 0:
                            raise CheckpointError(f"{archive_path}: {info.filename!r} is larger than the archive says")
                        file.write(chunk)
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, zlib.error) as error:
        raise CheckpointError(f"{archive_path} is no readable archive: {error}") from error


def _checked(path: Path, members: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    files = [m for m in members if not m.is_dir()]
    names = [m.filename for m in files]
    if len(names) > MAX_MEMBERS:
        raise CheckpointError(f"{path} holds {len(names)} files; at most {MAX_MEMBERS} are unpacked")
    for info in files:
        mode = info.external_attr >> 16
        if not _NAME.fullmatch(info.filename) or (mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode)):
            raise CheckpointError(
                f"{path} holds {info.filename!r}, which is no plain file inside the archive; nothing was unpacked"
            )
    if len({n.lower() for n in names}) != len(names):
        raise CheckpointError(f"{path} holds a name twice; nothing was unpacked")
    total, packed = sum(m.file_size for m in files), path.stat().st_size
    if total > max(FREE_SIZE, MAX_RATIO * packed):
        raise CheckpointError(
            f"{path} ({packed} bytes) would grow to {total} bytes, more than {MAX_RATIO} times; nothing was unpacked"
        )
    return files

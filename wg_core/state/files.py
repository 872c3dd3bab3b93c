"""Files that are whole or absent: written beside their place, flushed to the disk, then named."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TEMP_PREFIX = ".tmp-"
CHUNK = 1 << 20
_ADVISE = getattr(os, "posix_fadvise", None)  # of what was just written it makes the disk begin at once, without waiting


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, durably."""
    missing: list[Path] = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_file(path: Path, data: bytes, *, exclusive: bool = False) -> None:
    """Write `data` to `path` so that a kill or power loss at any instant leaves the old file or the new one.

    With `exclusive` an existing file is never replaced.
    Raises: FileExistsError if `exclusive` and `path` exists.
    """
    make_folder(path.parent)
    temp = _temp(path.parent)
    try:
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(temp, path)
        else:
            os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_while(folder: Path, data: bytes, find: Callable[[], Path | None]) -> None:
    """Write `data` below `folder` while `find` still looks for its name, as `write_file` would; None: it is not wanted.

    The disk and the processor work at the same time, which counts for what is large.
    """
    make_folder(folder)
    temp = _temp(folder)
    unwanted = threading.Event()

    def write() -> None:
        with open(temp, "xb") as file:
            for at in range(0, len(data), CHUNK):
                if unwanted.is_set():
                    return
                file.write(memoryview(data)[at : at + CHUNK])
                if _ADVISE is not None:
                    _ADVISE(file.fileno(), at, CHUNK, os.POSIX_FADV_DONTNEED)
            file.flush()
            if not unwanted.is_set():
                os.fsync(file.fileno())

    try:
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            path = None
            try:
                path = find()
                if path is not None:
                    make_folder(path.parent)
            finally:
                if path is None:
                    unwanted.set()
            writing.result()
        if path is not None:
            os.replace(temp, path)
            sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def _temp(folder: Path) -> Path:
    return folder / f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"

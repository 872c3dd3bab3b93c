"""Blobs in a folder: bytes by the sha256 of their content, shared by all worlds of a store."""

from __future__ import annotations

import os
import time
from pathlib import Path

from wg_core.errors import ConfigError, CorruptSnapshotError
from wg_core.execution.blobs import BlobStore, MemoryBlobs
from wg_core.state.canonical import is_sha256, sha256_bytes
from wg_core.state.files import sync_folder, write_file, write_while

__all__ = ["BlobStore", "FileBlobs", "MemoryBlobs", "OverBlobs"]

FRESH_S = 600.0
LARGE = 1 << 20


class FileBlobs:
    """Blobs as files `root/ab/cd/abcd...`; two objects on one folder are equal."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        self._durable: set[str] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileBlobs) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __repr__(self) -> str:
        return f"FileBlobs({str(self.root)!r})"

    def path(self, sha: str) -> Path:
        """The file of `sha`, present or not. Raises: ConfigError if `sha` is not 64 lower-case hex digits."""
        if not is_sha256(sha):
            raise ConfigError(f"bad blob id {str(sha)[:80]!r}: a blob's id is the sha256 of its bytes in hex")
        return self.root / sha[:2] / sha[2:4] / sha

    def put(self, data: bytes) -> str:
        """Store `data` durably and return its sha256; bytes that are stored already are not written again."""
        sha = ""

        def find() -> Path | None:
            nonlocal sha
            sha = sha256_bytes(data)
            return None if self._stored(sha, len(data)) else self.path(sha)

        if len(data) >= LARGE:
            write_while(self.root, data, find)
        elif path := find():
            write_file(path, data)
        self._durable.add(sha)
        return sha

    def _stored(self, sha: str, size: int) -> bool:
        """Whether the bytes are stored, durably and spared by `gc` from now on."""
        path = self.path(sha)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        if stat.st_size != size:
            return False
        if time.time() - stat.st_mtime > FRESH_S:
            os.utime(path)  # in use again: `gc` spares what is young
        if sha not in self._durable:  # named by another process, which may not have flushed the folders yet
            for folder in (path.parent, path.parent.parent, self.root):
                sync_folder(folder)
        return True

    def get(self, sha: str) -> bytes:
        """The bytes of `sha`. Raises: CorruptSnapshotError if they are absent or have another hash."""
        path = self.path(sha)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise CorruptSnapshotError(
                f"blob {sha} is missing: no file {path}; restore it from a copy of the store"
            ) from None
        actual = sha256_bytes(data)
        if actual != sha:
            raise CorruptSnapshotError(
                f"blob {sha} is corrupt: {path} has sha256 {actual}; restore the file from a copy of the store"
            )
        return data

    def forget(self, sha: str) -> None:
        """Remove `sha`, if it is stored."""
        self._durable.discard(sha)
        self.path(sha).unlink(missing_ok=True)

    def has(self, sha: str) -> bool:
        """Whether a file of `sha` is stored (its bytes are checked by `get`)."""
        return self.path(sha).is_file()


class OverBlobs(FileBlobs):
    """Blobs in a folder that lies over another store: what is not here is read there, and nothing is written there."""

    def __init__(self, root: Path | str, below: FileBlobs) -> None:
        super().__init__(root)
        self.below = below

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OverBlobs) and (other.root, other.below) == (self.root, self.below)

    __hash__ = FileBlobs.__hash__

    def put(self, data: bytes) -> str:
        sha = sha256_bytes(data)
        return sha if self.below.has(sha) else super().put(data)

    def get(self, sha: str) -> bytes:
        return super().get(sha) if super().has(sha) else self.below.get(sha)

    def has(self, sha: str) -> bool:
        return super().has(sha) or self.below.has(sha)

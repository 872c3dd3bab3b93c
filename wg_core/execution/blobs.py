"""Where a run puts bytes: by content hash."""

from __future__ import annotations

from hashlib import sha256
from typing import Protocol

from wg_core.errors import CorruptSnapshotError


class BlobStore(Protocol):
    """Bytes by the sha256 (hex) of their content."""

    def put(self, data: bytes) -> str:
        """Store `data` and return its hash; storing it again changes nothing."""
        ...

    def get(self, sha: str) -> bytes:
        """The bytes of `sha`. Raises: CorruptSnapshotError if they are absent or do not match the hash."""
        ...

    def has(self, sha: str) -> bool:
        """Whether `sha` is stored."""
        ...


class MemoryBlobs:
    """Blobs in memory: the default of a run that has no store."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        sha = sha256(data).hexdigest()
        self._data.setdefault(sha, bytes(data))
        return sha

    def get(self, sha: str) -> bytes:
        try:
            return self._data[sha]
        except KeyError:
            raise CorruptSnapshotError(
                f"blob {sha!r} is not in this run's memory; give the run the store that holds it"
            ) from None

    def has(self, sha: str) -> bool:
        return sha in self._data

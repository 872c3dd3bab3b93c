"""A part of a content: one JSON value in one blob, written when it changed and read when it is needed."""

from __future__ import annotations

from typing import Any, cast

from wg_core.errors import CorruptSnapshotError
from wg_core.execution.blobs import BlobStore
from wg_core.state.canonical import canonical_bytes, parse_json, sha256_json


def read_json(blobs: BlobStore, sha: str, what: str) -> Any:
    """The JSON of a blob. Raises: CorruptSnapshotError if it is missing, altered or no JSON."""
    data = blobs.get(sha)
    try:
        return parse_json(data)
    except ValueError as error:
        raise CorruptSnapshotError(f"blob {sha} is no {what}: {error}; restore it from a copy of the store") from None


class Part:
    """An immutable JSON value that remembers where it is stored."""

    __slots__ = ("_blobs", "_sha", "_value", "_what")

    def __init__(self, value: Any = None, *, what: str, sha: str | None = None, blobs: BlobStore | None = None) -> None:
        self._value = value
        self._what = what
        self._sha = sha
        self._blobs = blobs

    @property
    def sha(self) -> str | None:
        """The hash under which the value was last stored or read; None before that."""
        return self._sha

    @property
    def value(self) -> Any:
        """The value; not to be changed by the reader. Raises: CorruptSnapshotError."""
        if self._value is None:
            self._value = read_json(cast(BlobStore, self._blobs), cast(str, self._sha), self._what)
        return self._value

    def record(self, *keys: str) -> dict[str, Any]:
        """The value as a dict that has `keys`. Raises: CorruptSnapshotError."""
        value = self.value
        if not isinstance(value, dict) or any(key not in value for key in keys):
            raise CorruptSnapshotError(f"blob {self._sha} is no {self._what}; restore it from a copy of the store")
        return cast("dict[str, Any]", value)

    @property
    def source(self) -> BlobStore:
        """The store that the value was read from or last stored in."""
        return cast(BlobStore, self._blobs)

    @property
    def stored(self) -> bool:
        """Whether any store holds the value."""
        return self._blobs is not None

    def kept_in(self, blobs: BlobStore) -> bool:
        """Whether `blobs` is the store that gave or took the value last."""
        return self._blobs is not None and self._blobs == blobs

    def hash(self) -> str:
        """The hash under which the value is stored, or would be."""
        if self._sha is None:
            self._sha = sha256_json(self.value)
        return self._sha

    def save(self, blobs: BlobStore, *, sure: bool = False) -> str:
        """Store the value unless `blobs` has taken or given it already (and, if `sure`, still has it); gives its hash."""
        if self._sha is None or self._blobs != blobs or (sure and not blobs.has(self._sha)):
            self._sha = blobs.put(canonical_bytes(self.value))
            self._blobs = blobs
        return self._sha

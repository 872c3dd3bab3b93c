"""The stored form of a content: a hash chain with one link for each state that was applied.

A link holds what its step changed: the entry of the chronicle, and the records that it wrote by number, kind, id and
hash. Who wants all records goes back until every number was met; so that this ends soon, each link also repeats the
next `PAGE` records, in turn. Writing a step therefore costs the same in a large world and an old one, and N records are
found in about N / `PAGE` links.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self, cast

from wg_core.errors import ConfigError, CorruptSnapshotError
from wg_core.execution.blobs import BlobStore
from wg_core.state.canonical import is_sha256
from wg_core.state.part import Part, read_json

__all__ = ["ARTIFACT", "KINDS", "PAGE", "Link", "entry_of", "is_link", "needed"]

KINDS = ("entity", "place", "term", "rule")
ARTIFACT = "artifact"
PAGE = 8
_TAG = "content_step"
_VERSIONS = ("1.0", "2.0")

Records = dict[str, dict[str, Part]]
Numbers = dict[tuple[str, str], int]
Item = tuple[str, str, Part]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of entries in one blob, as contents of version 1.0 have them."""

    part: Part
    count: int

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The entries, oldest first. Raises: CorruptSnapshotError."""
        entries = self.part.record("entries")["entries"]
        if not isinstance(entries, list) or len(cast("list[Any]", entries)) != self.count:
            raise CorruptSnapshotError("a chronicle segment holds another number of entries than its root says")
        return cast("list[dict[str, Any]]", entries)


@dataclass(eq=False, slots=True)
class Link:
    """One link: `count` records and `length` entries up to here, the last of them made at step `latest`.

    The first link of a world has no entry, and all records as its changes.
    """

    texts: Part
    lists: Part
    changes: dict[int, Item]
    count: int
    entry: dict[str, Any] | None = None
    page: tuple[int, list[Item]] = (0, [])
    length: int = 0
    latest: int = -1
    segments: tuple[Segment, ...] = ()
    _previous: Link | None = None
    _before: str | None = None
    _part: Part | None = field(default=None)

    @classmethod
    def first(cls, texts: Part, lists: Part, records: Mapping[str, Mapping[str, Part]]) -> Self:
        """The link that a world begins with."""
        items = [(kind, id, part) for kind, parts in records.items() for id, part in parts.items()]
        return cls(texts, lists, dict(enumerate(items)), len(items))

    def after(
        self, entry: dict[str, Any], changed: Collection[tuple[str, str]], records: Records, numbers: Numbers
    ) -> Link:
        """The link of the next step: `changed` names what is new in `records`, `numbers` all records in order."""
        count = len(numbers)
        start = self.page[0] + PAGE
        start = start if start < count else 0
        turn = [(kind, id, records[kind][id]) for kind, id in islice(numbers, start, start + PAGE)]
        return Link(
            self.texts, self.lists,
            {numbers[key]: (*key, records[key[0]][key[1]]) for key in changed}, count, entry, (start, turn),
            self.length + 1, max(self.latest, entry["step"]), _previous=self,
        )  # fmt: skip

    # ---- stored ----------------------------------------------------------------------------------------------------

    @property
    def part(self) -> Part:
        """The link as it is stored."""
        if self._part is None:
            before = self.previous
            start, turn = self.page
            value: dict[str, Any] = {
                "schema_version": _VERSIONS[-1],
                "texts": self.texts.hash(),
                "lists": self.lists.hash(),
                "count": self.count,
                "length": self.length,
                "latest": self.latest,
                "previous": before.part.hash() if before is not None else None,
                "entry": self.entry,
                "changes": [[n, kind, id, part.hash()] for n, (kind, id, part) in sorted(self.changes.items())],
                "page": [start, [[kind, id, part.hash()] for kind, id, part in turn]],
            }
            self._part = Part({_TAG: value}, what="content")
        return self._part

    def save(self, blobs: BlobStore) -> str:
        """Store what `blobs` does not hold yet and give the hash of the link; what is stored is not looked at."""
        new: list[Link] = []
        link: Link | None = self
        while link is not None and not (link._part is not None and link._part.kept_in(blobs)):
            new.append(link)
            link = link.previous
        if any(link._part is not None and link._part.stored for link in new):  # it lies in another store as yet
            for _, part in self.parts():
                part.save(blobs)
        for link in reversed(new):
            if link._part is None or not link._part.stored:
                for part in (link.texts, link.lists, *(part for _, _, part in link.changes.values())):
                    part.save(blobs)
            link.part.save(blobs)
        return self.part.save(blobs, sure=not new)

    @classmethod
    def load(cls, blobs: BlobStore, sha: str) -> Link:
        """The link under a hash; those before it are read when they are needed. Raises: CorruptSnapshotError."""
        data = read_json(blobs, sha, "content")

        def part(sha: Any, what: str) -> Part:
            if not is_sha256(sha):
                raise ValueError(f"{sha!r} is no hash")
            return Part(what=what, sha=cast(str, sha), blobs=blobs)

        def items(rows: Sequence[Sequence[Any]]) -> list[Item]:
            return [(str(kind), str(id), part(sha, f"{kind} record")) for kind, id, sha in rows]

        try:
            form = data.get(_TAG, data)
            version = form["schema_version"]
            if version not in _VERSIONS:
                raise ConfigError(
                    f"content {sha} has schema version {version!r}; {' or '.join(_VERSIONS)} is needed: it was written "
                    "by a newer version of this package"
                )
            link = cls(part(form["texts"], "content texts"), part(form["lists"], "content lists"), {}, 0)
            link._part = Part(data, what="content", sha=sha, blobs=blobs)
            if version == "1.0":
                rows = [(kind, id, sha) for kind in KINDS for id, sha in form["kinds"][kind]]
                rows += [(ARTIFACT, id, sha) for id, sha in form["artifacts"]]
                link.changes, link.count = dict(enumerate(items(rows))), len(rows)
                chronicle = [(part(s, "chronicle segment"), int(n), int(last)) for s, n, _, last in form["chronicle"]]
                link.segments = tuple(Segment(p, n) for p, n, _ in chronicle)
                link.length = sum(n for _, n, _ in chronicle)
                link.latest = max((last for _, _, last in chronicle), default=-1)
                return link
            link.count, link.length, link.latest = (int(form[key]) for key in ("count", "length", "latest"))
            link.entry, link._before = form["entry"], form["previous"]
            rows = form["changes"]
            link.changes = dict(zip((int(row[0]) for row in rows), items([row[1:] for row in rows]), strict=True))
            link.page = int(form["page"][0]), items(form["page"][1])
            if link._before is not None and not (is_sha256(link._before) and isinstance(link.entry, dict)):
                raise ValueError("it follows another link but has no entry, or its hash is none")
            return link
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CorruptSnapshotError(f"blob {sha} is no content: {error}") from None

    @property
    def previous(self) -> Link | None:
        """The link before, None for the first. Raises: CorruptSnapshotError."""
        if self._previous is None and self._before is not None:
            self._previous = Link.load(self.part.source, self._before)
        return self._previous

    def chain(self) -> Iterator[Link]:
        """This link and all before it."""
        link: Link | None = self
        while link is not None:
            yield link
            link = link.previous

    # ---- read ------------------------------------------------------------------------------------------------------

    def records(self) -> tuple[Records, Numbers]:
        """All records by kind and id in order of appearance, and the number of each. Raises: CorruptSnapshotError."""
        found: dict[int, Item] = {}
        for link in self.chain():
            start, turn = link.page
            for number, item in (*link.changes.items(), *enumerate(turn, start)):
                found.setdefault(number, item)
            if len(found) >= self.count:
                break
        records: Records = {kind: {} for kind in (*KINDS, ARTIFACT)}
        numbers: Numbers = {}
        for number in range(self.count):
            kind, id, part = found.get(number, (None, "", self.part))
            if kind not in records or id in records[kind]:
                raise CorruptSnapshotError(f"content {self.part.sha} does not name its record {number}, or does so twice")
            records[kind][id] = part
            numbers[kind, id] = number
        return records, numbers

    def entries(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Entries `start` to `stop` (not included) of the chronicle, oldest first. Raises: CorruptSnapshotError."""
        found: list[dict[str, Any]] = []
        for link in self.chain():
            if link.length <= start:
                break
            if link.entry is not None and link.length <= stop:
                found.append(link.entry)
            else:
                base = link.length
                for segment in reversed(link.segments):
                    base -= segment.count
                    if base < stop and base + segment.count > start:
                        found += reversed(segment.entries[max(start - base, 0) : stop - base])
        return found[::-1]

    def applied(self, state_hash: str, step: int) -> bool:
        """Whether this state was applied at this step."""
        for link in self.chain():
            if link.latest < step:
                return False
            entries = [link.entry] if link.entry is not None else [e for s in link.segments for e in s.entries]
            if any(e["step"] == step and e["state_hash"] == state_hash for e in entries):
                return True
        return False

    def parts(self) -> Iterator[tuple[str, Part]]:
        """All that is needed to read this content, each with a name for messages."""
        yield from self.current()
        yield from self.before()

    def current(self) -> Iterator[tuple[str, Part]]:
        """Texts, lists and the records as they are now."""
        yield "texts", self.texts
        yield "lists", self.lists
        for kind, parts in self.records()[0].items():
            yield from ((f"{kind}:{id}", part) for id, part in parts.items())

    def before(self, known: Collection[str] = ()) -> Iterator[tuple[str, Part]]:
        """The links from the first of them that is not `known` (by hash) to this one, newest first."""
        for link in self.chain():
            yield f"chronicle[{link.length}]", link.part
            yield from ((f"segment[{i}]", segment.part) for i, segment in enumerate(link.segments))
            if link._before in known:
                break


def is_link(data: bytes) -> bool:
    """Whether a blob is a link of a content."""
    return data.startswith(f'{{"{_TAG}":'.encode())


def entry_of(part: Part) -> dict[str, Any] | None:
    """What a link says that happened (nothing in the first one), None for a part that is no link."""
    value = part.value
    if not isinstance(value, dict) or _TAG not in value:
        return None
    return cast("dict[str, Any]", value[_TAG]["entry"] or {})


def needed(blobs: BlobStore, root: str, known: Collection[str]) -> Iterator[tuple[str, Part]]:
    """What the content under `root` needs, without what those under the `known` roots need.

    Raises: CorruptSnapshotError.
    """
    link = Link.load(blobs, root)
    if link._before in known:
        yield "texts", link.texts
        yield "lists", link.lists
        yield from ((f"{kind}:{id}", part) for kind, id, part in link.changes.values())
    else:
        yield from link.current()
    yield from link.before(known)

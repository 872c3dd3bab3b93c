"""World content: everything a world holds to be true, and its chronicle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any, cast

from wg_core.errors import ConfigError, SnapshotConflictError, did_you_mean
from wg_core.execution.blobs import BlobStore
from wg_core.state.canonical import canonical_bytes, plain
from wg_core.state.chain import ARTIFACT, KINDS, Link, Numbers, Records
from wg_core.state.part import Part
from wg_core.state.state import State
from wg_core.state.view import WorldView

__all__ = ["KINDS", "WorldContent", "WorldView", "apply"]

MAX_RECORD_BYTES = 256 * 1024
_TEXTS = ("description", "style", "story")
_LISTS = ("media", "links")
_SEED_KINDS = {"characters": "entity", "places": "place", "glossary": "term", "rules": "rule"}


def _no_records() -> dict[str, dict[str, Part]]:
    return {kind: {} for kind in (*KINDS, ARTIFACT)}


class WorldContent:
    """Entities, places, terms, rules, artifacts, texts and the chronicle; immutable, changed only by `apply`.

    A record is `{id, kind, fields, retired, provenance: {created, changed: {field: by}, retired?}}` where each `by` is
    `{step, made_by}`. Records are read from their store when first asked for; all readers give copies.
    """

    __slots__ = ("_found", "_link")

    def __init__(self, link: Link | None = None, found: tuple[Records, Numbers] | None = None) -> None:
        if link is None:
            texts = Part(dict.fromkeys(_TEXTS, ""), what="content texts")
            link = Link.first(texts, Part({name: [] for name in _LISTS}, what="content lists"), _no_records())
        self._link = link
        self._found = found

    def __repr__(self) -> str:
        return f"<WorldContent of {self._link.count} records and {self._link.length} events>"

    @property
    def _records(self) -> Records:
        if self._found is None:
            self._found = self._link.records()
        return self._found[0]

    @property
    def _numbers(self) -> Numbers:
        if self._found is None:
            self._found = self._link.records()
        return self._found[1]

    # ---- from and to ---------------------------------------------------------------------------------------------

    @classmethod
    def from_seed(cls, seed: Mapping[str, Any]) -> WorldContent:
        """The content that a world file's `content` field describes.

        `characters` and `places` are lists of `{id?, name?, ...}` or names; `glossary` is such a list or
        `{term: text}`; `rules` a list of texts or `{id?, text}`. A missing id is made from the name.
        Raises: ConfigError naming the path.
        """
        data = cast("dict[str, Any]", plain(dict(seed), "content"))
        known = (*_TEXTS, *_LISTS, *_SEED_KINDS)
        for key in data:
            if key not in known:
                raise ConfigError(f"content.{key}: there is no such field; {did_you_mean(key, known)}")
        texts = {name: _seed_text(data.get(name), f"content.{name}") for name in _TEXTS}
        lists = {name: _seed_list(data.get(name), f"content.{name}") for name in _LISTS}
        records = _no_records()
        for name, kind in _SEED_KINDS.items():
            records[kind] = _seed_records(data.get(name), kind, f"content.{name}")
        return cls(Link.first(Part(texts, what="content texts"), Part(lists, what="content lists"), records))

    def save(self, blobs: BlobStore) -> str:
        """Store what `blobs` does not hold yet and give the root hash; unchanged content is not looked at."""
        return self._link.save(blobs)

    @classmethod
    def load(cls, blobs: BlobStore, root: str) -> WorldContent:
        """The content under a root hash; parts are read when they are first used.

        Raises: CorruptSnapshotError, ConfigError for one that a newer version of this package wrote.
        """
        return cls(Link.load(blobs, root))

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every stored part with a name for messages."""
        return self._link.parts()

    # ---- reading -------------------------------------------------------------------------------------------------

    @property
    def description(self) -> str:
        """What kind of world this is."""
        return str(self._link.texts.record(*_TEXTS)["description"])

    @property
    def style(self) -> str:
        """How the world is told."""
        return str(self._link.texts.record(*_TEXTS)["style"])

    @property
    def story(self) -> str:
        """What happened before the first step."""
        return str(self._link.texts.record(*_TEXTS)["story"])

    @property
    def media(self) -> list[Any]:
        """Media of the world file."""
        return plain(self._link.lists.record(*_LISTS)["media"], "media")

    @property
    def links(self) -> list[Any]:
        """Links to other worlds and things."""
        return plain(self._link.lists.record(*_LISTS)["links"], "links")

    @property
    def rules(self) -> list[str]:
        """The texts of the rules in force."""
        return [text_of(record) for record in self.records("rule")]

    def ids(self, kind: str, *, retired: bool = False) -> list[str]:
        """The ids of a kind (entity, place, term, rule) in order of appearance; living ones unless `retired`."""
        parts = self._kind(kind)
        return list(parts) if retired else [i for i, p in parts.items() if not p.record("retired")["retired"]]

    def get(self, kind: str, id: str) -> dict[str, Any] | None:
        """A record, retired or not; None if there is none. Raises: ConfigError for an unknown kind."""
        part = self._kind(kind).get(id)
        return plain(part.value, id) if part is not None else None

    def records(self, kind: str, *, retired: bool = False) -> list[dict[str, Any]]:
        """All records of a kind in order of appearance; living ones unless `retired`."""
        found = (part.record("id", "fields", "retired", "provenance") for part in self._kind(kind).values())
        return [plain(r, kind) for r in found if retired or not r["retired"]]

    @property
    def artifact_ids(self) -> list[str]:
        """The ids of all registered artifacts, oldest first."""
        return list(self._records[ARTIFACT])

    def artifact(self, id: str) -> dict[str, Any] | None:
        """`{artifact, step, made_by, descriptions: [{step, text, facts}]}` of a registered artifact, else None."""
        part = self._records[ARTIFACT].get(id)
        return plain(part.value, id) if part is not None else None

    @property
    def chronicle_length(self) -> int:
        """How many entries the chronicle has."""
        return self._link.length

    def chronicle(self, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
        """Entries `start` to `stop` (not included), oldest first; negative numbers count from the end."""
        start, stop, _ = slice(start, stop).indices(self.chronicle_length)
        return plain(self._link.entries(start, stop), "chronicle")

    def why(self, kind: str, id: str, name: str | None = None) -> dict[str, Any] | None:
        """Which step and maker a record, or one field of it, comes from: `{step, made_by}`; None if unknown."""
        record = self.get(kind, id)
        if record is None:
            return None
        by = record["provenance"]
        return by["created"] if name is None else by["changed"].get(name)

    def applied(self, state_hash: str, step: int) -> bool:
        """Whether this state was applied at this step already."""
        return self._link.applied(state_hash, step)

    def view(self, *, linked: Mapping[str, WorldContent] | None = None) -> WorldView:
        """A read-only view for pipelines; `linked` are other worlds' contents that may be quoted, by world id."""
        return WorldView(self, linked=linked)

    def _kind(self, kind: str) -> Mapping[str, Part]:
        if kind not in KINDS:
            raise ConfigError(f"no kind {kind!r} in a content; {did_you_mean(kind, KINDS)}")
        return self._records[kind]

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON document: texts, lists, records by kind and id, artifacts, the chronicle; a copy."""
        value = {
            **self._link.texts.value,
            **self._link.lists.value,
            **{kind: {i: part.value for i, part in self._records[kind].items()} for kind in KINDS},
            "artifacts": {i: part.value for i, part in self._records[ARTIFACT].items()},
            "chronicle": self._link.entries(0, self._link.length),
        }
        return plain(value, "content")

    # ---- comparing -----------------------------------------------------------------------------------------------

    def diff(self, other: WorldContent) -> dict[str, Any]:
        """What `other` has more (`added`), less (`removed`) or otherwise (`changed`), by kind."""
        result: dict[str, Any] = {}
        pairs = [(kind, self._records[kind], other._records[kind]) for kind in KINDS]
        for kind, mine, theirs in (*pairs, ("artifact", self._records[ARTIFACT], other._records[ARTIFACT])):
            found = {
                "added": [i for i in theirs if i not in mine],
                "removed": [i for i in mine if i not in theirs],
                "changed": [i for i in mine if i in theirs and mine[i].value != theirs[i].value],
            }
            if any(found.values()):
                result[kind] = {name: ids for name, ids in found.items() if ids}
        for name, mine, theirs in (("texts", self._link.texts, other._link.texts), ("lists", self._link.lists, other._link.lists)):
            changed = [key for key in mine.value if mine.value[key] != theirs.value.get(key)]
            if changed:
                result[name] = {"changed": changed}
        if self.chronicle_length != other.chronicle_length:
            result["chronicle"] = {"entries": [self.chronicle_length, other.chronicle_length]}
        return result


def apply(content: WorldContent, state: State, *, step: int, made_by: str) -> WorldContent:
    """The content after a full state became true: a pure function of its arguments.

    The outcome is appended to the chronicle, its changes are made, artifacts and their descriptions are registered.
    A change that cannot be made (an id that is taken, unknown or retired) is recorded in the entry under `refused`.
    Raises: ConfigError for a state that is not full, SnapshotConflictError for one applied at this step already.
    """
    missing = sorted(set(range(1, 6)) - state.filled())
    if missing:
        raise ConfigError(f"only a full state can be applied; blocks {', '.join(map(str, missing))} are empty")
    if step < 0:
        raise ConfigError(f"step {step} is negative; the first step is 0")
    state_hash = state.hash()
    if content.applied(state_hash, step):
        raise SnapshotConflictError(f"state {state_hash} was applied at step {step} already; a state becomes true once")
    by = {"step": step, "made_by": made_by}
    outcome = state.get("outcome")
    records = {kind: dict(parts) for kind, parts in content._records.items()}
    changed: dict[tuple[str, str], None] = {}
    accepted: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for change in outcome["changes"]:
        kind, id = change["kind"], change["id"]
        record, reason = _changed(records[kind].get(id), change, by)
        if record is None:
            refused.append({"change": change, "reason": reason})
        else:
            records[kind][id] = Part(record, what=f"{kind} record")
            changed[kind, id] = None
            accepted.append(change)
    made = list(state.artifacts())
    described = state.get("descriptions")["items"]
    artifacts = records[ARTIFACT]
    for artifact in made:
        id = artifact["id"]
        old = artifacts.get(id)
        artifacts[id] = _registered(old, artifact, [item for item in described if item["artifact_id"] == id], by)
        if artifacts[id] is not old:
            changed[ARTIFACT, id] = None
    entry = {
        **by,
        "narrative": outcome["narrative"],
        "intent": state.get("intent"),
        "changes": accepted,
        "refused": refused,
        "artifacts": list(dict.fromkeys(artifact["id"] for artifact in made)),
        "state_hash": state_hash,
    }
    new = [key for key in changed if key not in content._numbers]
    numbers = content._numbers | dict(zip(new, count(len(content._numbers)), strict=False)) if new else content._numbers
    return WorldContent(content._link.after(entry, changed, records, numbers), (records, numbers))


def _changed(
    part: Part | None, change: dict[str, Any], by: dict[str, Any]
) -> tuple[dict[str, Any], None] | tuple[None, str]:
    kind, id, fields = change["kind"], change["id"], change["fields"]
    old = part.record("fields", "retired", "provenance") if part is not None else None
    if change["op"] == "add":
        if old is not None:
            how = "was retired; add under a new id" if old["retired"] else "exists; update it, or add under a new id"
            return None, f"{kind} {id!r} {how}"
        if id != id.strip() or not id.isprintable():
            return None, f"{kind} id {id!r} has blanks around it or unprintable characters"
        record = new_record(kind, id, fields, by)
    elif old is None:
        return None, f"there is no {kind} {id!r}"
    elif old["retired"]:
        return None, f"{kind} {id!r} was retired"
    else:
        provenance = {**old["provenance"], "changed": {**old["provenance"]["changed"], **dict.fromkeys(fields, by)}}
        record = {**old, "fields": {**old["fields"], **fields}, "provenance": provenance}
        if change["op"] == "retire":
            record |= {"retired": True, "provenance": {**provenance, "retired": by}}
    size = len(canonical_bytes(record))
    if size > MAX_RECORD_BYTES:
        return None, f"{kind} {id!r} would take {size} bytes, more than {MAX_RECORD_BYTES}"
    return record, None


def new_record(kind: str, id: str, fields: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """A living record made by `by`."""
    provenance = {"created": by, "changed": dict.fromkeys(fields, by)}
    return {"id": id, "kind": kind, "fields": fields, "retired": False, "provenance": provenance}


def text_of(record: Mapping[str, Any]) -> str:
    """The sentence of a rule or term: its `text`, else its fields joined."""
    text = record["fields"].get("text")
    return text if isinstance(text, str) and text else "; ".join(f"{k}: {v}" for k, v in record["fields"].items())


def _registered(
    old: Part | None, artifact: dict[str, Any], items: Iterable[dict[str, Any]], by: dict[str, Any]
) -> Part:
    new = [{"step": by["step"], "text": item["text"], "facts": item["facts"]} for item in items]
    if old is None:
        return Part({"artifact": artifact, **by, "descriptions": new}, what="artifact record")
    record = old.record("artifact", "descriptions")
    seen = [(d["text"], d["facts"]) for d in record["descriptions"]]
    fresh = [d for d in new if (d["text"], d["facts"]) not in seen]
    return Part({**record, "descriptions": [*record["descriptions"], *fresh]}, what="artifact record") if fresh else old


# ---- seeds -----------------------------------------------------------------------------------------------------------


def _seed_text(value: Any, path: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{path}: a text is needed, not {type(value).__name__}")
    return value.strip()


def _seed_list(value: Any, path: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{path}: a list is needed, not {type(cast(object, value)).__name__}")
    return cast("list[Any]", value)


def _seed_records(value: Any, kind: str, path: str) -> dict[str, Part]:
    if kind == "term" and isinstance(value, dict):
        terms = cast("dict[str, Any]", value).items()
        value = [{"name": name, **(text if isinstance(text, dict) else {"text": text})} for name, text in terms]
    by = {"step": 0, "made_by": "world file"}
    found: dict[str, Part] = {}
    for i, item in enumerate(_seed_list(value, path)):
        here = f"{path}[{i}]"
        if isinstance(item, str) and item.strip():
            item = {"text" if kind == "rule" else "name": item.strip()}
        if not isinstance(item, dict):
            raise ConfigError(f"{here}: a mapping with id or name is needed, not {type(item).__name__}")
        fields = dict(cast("dict[str, Any]", item))
        id = fields.pop("id", None)
        if id is None:
            id = f"rule_{i + 1}" if kind == "rule" else _slug(fields.get("name") or fields.get("term"))
        if not isinstance(id, str) or not id or id != id.strip() or not id.isprintable() or len(id) > 128:
            raise ConfigError(f"{here}: an id (printable text, at most 128 characters) or a name is needed")
        if id in found:
            raise ConfigError(f"{here}: the id {id!r} is taken by an earlier item; give each its own id")
        if kind == "rule" and not (isinstance(fields.get("text"), str) and fields["text"].strip()):
            raise ConfigError(f"{here}: a rule needs its text")
        found[id] = Part(new_record(kind, id, fields, by), what=f"{kind} record")
    return found


def _slug(name: Any) -> str | None:
    if not isinstance(name, str):
        return None
    return re.sub(r"\W+", "_", name.casefold()).strip("_")[:128] or None

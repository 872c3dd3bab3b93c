"""The read-only view of a world's content that pipelines see."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wg_core.state.content import WorldContent

RECENT = 3
NEAR = 0.2
Ranker = Callable[[str, Sequence[str]], Sequence[float]]
"""How near each of some texts is to a query: 1 says the same, what is not above `NEAR` has nothing to do with it."""
_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75


class WorldView:
    """Style, rules, chronicle and what else is relevant to a query, as whole items."""

    __slots__ = ("_candidates", "_content", "_linked")

    def __init__(self, content: WorldContent, *, linked: Mapping[str, WorldContent] | None = None) -> None:
        self._content = content
        self._linked = dict(linked or {})
        self._candidates: list[_Candidate] | None = None

    @property
    def description(self) -> str:
        """What kind of world this is."""
        return self._content.description

    @property
    def style(self) -> str:
        """How the world is told."""
        return self._content.style

    @property
    def story(self) -> str:
        """What happened before the first step."""
        return self._content.story

    @property
    def rules(self) -> list[str]:
        """The texts of the rules in force."""
        return self._content.rules

    @property
    def entity_ids(self) -> list[str]:
        """The ids of the living entities."""
        return self._content.ids("entity")

    @property
    def place_ids(self) -> list[str]:
        """The ids of the places that still are."""
        return self._content.ids("place")

    @property
    def term_ids(self) -> list[str]:
        """The ids of the glossary's terms."""
        return self._content.ids("term")

    def last(self, n: int = 1) -> list[dict[str, Any]]:
        """The last `n` entries of the chronicle, oldest first."""
        return self._content.chronicle(-n) if n > 0 else []

    def read(self, kind: str, id: str) -> dict[str, Any] | None:
        """A record of a kind (entity, place, term, rule), None if there is none."""
        return self._content.get(kind, id)

    def items(self, query: str = "", limit: int | None = None, *, rank: Ranker | None = None) -> list[dict[str, str]]:
        """Whole items `{text, source}`, most important first: style, rules, description, last events, what is relevant.

        Relevance is what `rank` says, without it lexical (Okapi BM25, Robertson and Zaragoza 2009). Without a query, or
        when nothing matches, what changed last comes first. Of linked worlds, the passage nearest to the query stands before the last events. The
        text of an item is never cut; `limit` bounds their number.
        """
        found: list[dict[str, str]] = []
        if self.style:
            found.append({"text": f"Style: {self.style}", "source": "style"})
        for record in self._content.records("rule"):
            found.append({"text": f"Rule: {_body(record)}", "source": f"rule:{record['id']}"})
        if self.description:
            found.append({"text": self.description, "source": "description"})
        candidates = self._ranked(query, rank)
        quoted = next((c for c in candidates if c.linked), None)
        if quoted is not None:
            found.append({"text": quoted.text, "source": quoted.source})
        recent = self.last(RECENT)
        if self.story and len(recent) < RECENT:
            found.append({"text": self.story, "source": "story"})
        for entry in recent:
            text = entry["narrative"].strip()
            if text:
                found.append({"text": f"Step {entry['step']}: {text}", "source": f"chronicle:{entry['step']}"})
        shown = {item["source"] for item in found}
        ranked = [c for c in candidates if c.source not in shown]
        found += [{"text": c.text, "source": c.source} for c in ranked]
        return found[:limit] if limit is not None else found

    @property
    def linked_ids(self) -> list[str]:
        """The ids of the linked worlds that can be quoted."""
        return sorted(self._linked)

    def search(
        self, query: str, limit: int | None = None, *, linked: str | bool | None = None, rank: Ranker | None = None
    ) -> list[dict[str, str]]:
        """What is near to the query (without `rank`: shares words with it), best first; nothing where nothing is.

        `linked=False` looks into this world only, True into all linked ones, an id into that one. The order is as in
        `items`.
        """
        found = [c for c in self._matching(query, rank) if linked is None or c.linked is bool(linked)]
        if isinstance(linked, str):
            found = [c for c in found if c.source.startswith(f"{linked}/")]
        return [{"text": c.text, "source": c.source} for c in found[:limit]]

    def _all(self) -> list[_Candidate]:
        if self._candidates is None:
            self._candidates = _candidates(self._content)
            for world, content in sorted(self._linked.items()):
                self._candidates += _candidates(content, world)
        return self._candidates

    def _matching(self, query: str, rank: Ranker | None) -> list[_Candidate]:
        candidates = self._all()
        if rank is None or not query.strip() or not candidates:
            scores, least = _bm25(_words(query), candidates), 0.0
        else:
            scores, least = rank(query, [c.text for c in candidates]), NEAR
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], -candidates[i].step, i))
        return [candidates[i] for i in order if scores[i] > least]

    def _ranked(self, query: str, rank: Ranker | None) -> list[_Candidate]:
        return self._matching(query, rank) or sorted(self._all(), key=lambda c: -c.step)


class _Candidate:
    __slots__ = ("counts", "linked", "size", "source", "step", "text")

    def __init__(self, text: str, source: str, step: int, linked: bool = False) -> None:
        words = _words(text)
        self.linked = linked
        self.text = text
        self.source = source
        self.step = step
        self.counts = Counter(words)
        self.size = len(words)


def _candidates(content: WorldContent, world: str = "") -> list[_Candidate]:
    """What of a content may be relevant; of a linked `world` also its rules and description."""
    found: list[_Candidate] = []
    prefix, says = (f"{world}/", f"{world}: ") if world else ("", "")

    def add(text: str, source: str, step: int = 0) -> None:
        if text:
            found.append(_Candidate(f"{says}{text}", f"{prefix}{source}", 0 if world else step, bool(world)))

    for kind in ("entity", "place", "term"):
        for record in content.records(kind):
            by = record["provenance"]
            step = max([by["created"]["step"], *(b["step"] for b in by["changed"].values())])
            name = str(record["fields"].get("name") or record["id"])
            add(f"{name} ({kind}): {_body(record)}", f"{kind}:{record['id']}", step)
    add(content.story, "story")
    if world:
        add(content.description, "description")
        for record in content.records("rule"):
            add(f"Rule: {_body(record)}", f"rule:{record['id']}")
    for entry in content.chronicle():
        text = entry["narrative"].strip()
        add(f"Step {entry['step']}: {text}" if text and not world else text, f"chronicle:{entry['step']}", entry["step"])
    return found


def _body(record: Mapping[str, Any]) -> str:
    fields: dict[str, Any] = record["fields"]
    lead = [fields[key] for key in ("text", "description") if fields.get(key)]
    rest = [f"{key}: {_said(value)}" for key, value in fields.items() if key not in ("name", "text", "description")]
    return "; ".join(_said(part) for part in (*lead, *rest))


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(_said(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_said(v)}" for k, v in value.items())  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _bm25(query: list[str], candidates: list[_Candidate]) -> list[float]:
    scores = [0.0] * len(candidates)
    if not candidates:
        return scores
    mean = sum(c.size for c in candidates) / len(candidates) or 1.0
    for word in sorted(set(query)):
        holding = sum(1 for c in candidates if word in c.counts)
        if not holding:
            continue
        weight = math.log(1 + (len(candidates) - holding + 0.5) / (holding + 0.5))
        for i, c in enumerate(candidates):
            n = c.counts[word]
            scores[i] += weight * n * (_K1 + 1) / (n + _K1 * (1 - _B + _B * c.size / mean))
    return scores

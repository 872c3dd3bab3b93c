"""Texts for prompts: templates whose names become input ports, and what a world knows about a query."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from wg_blocks.search import Build, searcher
from wg_core import Block, Port
from wg_core.errors import ConfigError, PortValueError

MAX_CHARS = 100_000

_NAME = re.compile(r"\{\{\s*([a-z][a-z0-9_]*)\s*\}\}")
_HALF = re.compile(r"\{\{|(?<!\{)\{\s*[a-z][a-z0-9_]*\s*\}\}")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_ -]*")


class Template(Block):
    """Fills a template: each `{{ name }}` is an input port, required unless listed in `optional`.

    One pass, so braces inside a value stay as they are. Lists become bullet lines, dicts `key: value` lines. A line
    whose names are all unset is left out. With `each` naming a port, that port takes a list and the block gives a
    list of texts, one for each element.

    Raises: ConfigError for half a placeholder or an unknown name in `optional` or `each`; PortValueError for a text of
    more than 100 000 characters or an `each` that is no list.
    """

    role = "text"

    def __init__(self, *, template: str, optional: Sequence[str] = (), each: str | None = None) -> None:
        if not isinstance(template, str):
            raise ConfigError(f"text/template: template is a text, not {type(template).__name__}")
        half = _HALF.search(_NAME.sub("", template))
        if half:
            raise ConfigError(
                f"text/template: unbalanced braces or a bad name near {half.group()!r} in {template[:80]!r}; "
                "placeholders look like {{ name }}, with a-z, 0-9 and _ only"
            )
        names = list(dict.fromkeys(_NAME.findall(template)))
        if "text" in names:
            raise ConfigError("text/template: 'text' is the name of the output; call the placeholder something else")
        for key, given in (("optional", optional), ("each", [each] if each else [])):
            if unknown := [n for n in given if n not in names]:
                raise ConfigError(f"text/template: {key} names {unknown[0]!r}, the template has {names or 'no names'}")
        self.ports = (
            *(Port(n, "in", "list" if n == each else "text|list|number|dict", optional=n in optional) for n in names),
            Port("text", "out", "text|list" if each else "text"),
        )
        super().__init__()
        self.each = each
        self._template = template
        self._lines = [(line, _NAME.findall(line)) for line in template.splitlines(keepends=True)]

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        fixed = {name: render(value) for name, value in inputs.items() if name != self.each}
        if self.each is None or self.each not in inputs:
            text = self._fill(fixed)
            return {"text": text if self.each is None else [text]}
        elements = inputs[self.each]
        if isinstance(elements, str) or not isinstance(elements, Sequence):
            raise PortValueError(f"text/template: {self.each!r} takes a list, one text is made for each element")
        return {"text": [self._fill({**fixed, self.each: render(element)}) for element in elements]}

    @property
    def fixed_text(self) -> str:
        """The template without what is filled in."""
        return _NAME.sub("", self._template)

    def _fill(self, values: Mapping[str, str]) -> str:
        kept = [line for line, names in self._lines if not names or any(n in values for n in names)]
        template = "".join(kept).rstrip()
        size = len(template) + sum(len(values.get(name, "")) for name in _NAME.findall(template))
        if size > MAX_CHARS:
            largest = max(values, key=lambda n: len(values[n]))
            raise PortValueError(
                f"text/template: the text would have about {size} characters, {MAX_CHARS} are allowed; "
                f"shorten {largest!r} ({len(values[largest])})"
            )
        return _NAME.sub(lambda match: values.get(match.group(1), ""), template)


class Context(Block):
    """Asks a world's view for the items nearest to `query` (without one: in the view's own order), best first.

    `search` names the embedding model that says what is near: `{block_type, config}`, in a world `{model: NAME}`. Without
    it items are ranked by words. Raises: ConfigError for a limit below 1, or a model that gives no embeddings.
    """

    role = "world"
    ports = (
        Port("world", "in", "world", description="a view with items(query)"),
        Port("query", "in", "text|list|dict", optional=True),
        Port("items", "out", "list", description="{text, source}, best first"),
    )

    def __init__(self, *, limit: int = 64, search: Mapping[str, Any] | None = None, build: Build | None = None) -> None:
        super().__init__()
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ConfigError(f"world/context: limit is a whole number from 1, not {limit!r}")
        self.limit = limit
        self._search = searcher(search, build)

    def get_sub_blocks(self) -> dict[str, Block]:
        return {"search": self._search.block} if self._search is not None else {}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found = inputs["world"].items(render(inputs.get("query", "")), rank=self._search)
        return {"items": [{"text": i["text"], "source": i["source"]} for i in islice(found, self.limit)]}


def render(value: Any) -> str:
    """A value as readable text: lists as bullet lines, dicts as `key: value` lines, anything deeper as JSON.

    What a view or a description says of something (`{text, source}`, `{text, artifact_id, facts}`) is its text.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        if _is_told(value):
            return value["text"]
        return "\n".join(f"{_key(k)}: {_short(v)}" for k, v in value.items())
    if isinstance(value, Sequence):
        return "\n".join(f"- {_short(item)}" for item in value)
    return _short(value)


def _is_told(value: Mapping[Any, Any]) -> bool:
    return isinstance(value.get("text"), str) and set(value) <= {"text", "source", "artifact_id", "facts"}


def _key(key: Any) -> str:
    return str(key) if _FIELD.fullmatch(str(key)) else json.dumps(str(key), ensure_ascii=False)


def _short(value: Any) -> str:
    """One line for one value."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Mapping) and _is_told(value):
        return " ".join(value["text"].split())
    if isinstance(value, bool) or value is None or isinstance(value, (Mapping, Sequence)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, int):
        return str(value)
    return f"{float(value):g}"

"""End World: a world that is only read."""

from __future__ import annotations

from typing import Any, Self, cast

from wg_core.assembly.build import Build
from wg_core.assembly.models import EndWorldEntry
from wg_core.levels.level import Written
from wg_core.state.content import WorldContent, WorldView


class EndWorld(Written):
    """Content without execution: it can be read, linked and quoted, never run or written."""

    level = kind = "end_world"

    def __init__(self, world_id: str, content: dict[str, Any], *, title: str | None = None) -> None:
        self.world_id = world_id
        self.title = title or world_id
        self.content = WorldContent.from_seed(content)
        self._content_seed = content

    def view(self) -> WorldView:
        """A read-only view of the content."""
        return self.content.view()

    @classmethod
    def from_entry(cls, entry: EndWorldEntry, build: Build) -> Self:
        return cls(entry.world_id, cast(dict[str, Any], entry.content), title=entry.title)

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": "end_world",
            "schema_version": "1.0",
            "world_id": self.world_id,
            "title": self.title,
            "content": self._content_seed,
        }

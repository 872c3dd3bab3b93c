"""Links from any part of a world to anything: data only, resolved by whoever reads them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class HyperLink(BaseModel):
    """A reference to a port, block, graph, pipeline, stage, world, state, artifact or end world."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_kind: str = Field(min_length=1, max_length=64)
    target_id: str = Field(min_length=1, max_length=512)
    fragment: str | None = None
    rel: str | None = None
    meta: dict[str, Any] | None = None


class Member(BaseModel):
    """One end of a hyperedge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    port: str | None = None
    role: str | None = None


class HyperEdge(BaseModel):
    """An edge of any arity; stored and queried, data flows only along dataflow edges."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    kind: str
    members: tuple[Member, ...] = Field(min_length=1)
    payload: dict[str, Any] | None = None

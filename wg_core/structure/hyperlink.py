"""Links from any part of a world to anything: data only, resolved by whoever reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from wg_core.errors import LinkError, did_you_mean


class HyperLink(BaseModel):
    """A reference to a port, block, graph, pipeline, stage, world, state, artifact or end world."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_kind: str = Field(min_length=1, max_length=64)
    target_id: str = Field(min_length=1, max_length=512)
    fragment: str | None = None
    rel: str | None = None
    meta: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.target_kind} {self.target_id}{f'#{self.fragment}' if self.fragment else ''}"


class Member(BaseModel):
    """One end of a hyperedge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    port: str | None = None
    role: str | None = None


class HyperEdge(BaseModel):
    """An edge of any arity, stored at a level; member paths are node paths below it.

    Kind `context` brings one value to several inputs: from the member with the role `source`, an output, else from an
    input of the level that is named like the hyperedge. It is lowered to edges and exposed inputs, for data flows only
    along these. Kinds `relation` and `group` are notes; other kinds register a lowering.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    kind: str
    members: tuple[Member, ...] = Field(min_length=1)
    payload: dict[str, Any] | None = None


Resolver = Callable[[HyperLink], Any]


@dataclass(slots=True)
class Resolvers:
    """What links point to, by target kind. Nothing is looked up before somebody resolves a link.

    A resolver gives the target as it is, or raises LookupError; it never changes it.
    """

    by_kind: dict[str, tuple[Resolver, Callable[[HyperLink], bool] | None]] = field(
        default_factory=dict[str, tuple[Resolver, Callable[[HyperLink], bool] | None]]
    )

    def register(self, kind: str, resolve: Resolver, *, knows: Callable[[HyperLink], bool] | None = None) -> Resolvers:
        """Resolve links to this kind of target; `knows` tells cheaply whether a target is there."""
        self.by_kind[kind] = (resolve, knows)
        return self

    def knows(self, link: HyperLink) -> bool:
        """Whether a link can be resolved, as far as that is known without doing it."""
        found = self.by_kind.get(link.target_kind)
        return found is not None and (found[1] is None or found[1](link))

    def resolve(self, link: HyperLink) -> Any:
        """The target of a link. Raises: LinkError."""
        found = self.by_kind.get(link.target_kind)
        if found is None:
            hint = did_you_mean(link.target_kind, self.by_kind)
            raise LinkError(f"link to {link}: nothing resolves kind {link.target_kind!r}; {hint}")
        try:
            return found[0](link)
        except LookupError as error:
            raise LinkError(f"link to {link}: {error.args[0] if error.args else 'there is no such target'}") from error

"""A place in a structure, a port that it offers outside, and what is set about a cycle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from wg_core.structure.hyperlink import HyperLink
from wg_core.structure.ids import ID_PATTERN
from wg_core.structure.port import Port

Child = TypeVar("Child")
Spec = dict[str, Any]
_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})


class ExternalPort(Port):
    """A port of a whole level, as its parent sees it; may be called `node:port`."""

    __slots__ = ()
    name_pattern = rf"(?:{ID_PATTERN})(?::[a-z][a-z0-9_]*)*"


@dataclass(slots=True)
class Node(Generic[Child]):
    """A place in a structure: exactly one child, and what holds at this place only.

    `defaults` gives values to unfed inputs, set with `set_default`; `hints` steer automatic wiring.
    """

    node_id: str
    child: Child
    trainable: bool = True
    defaults: Mapping[str, Any] = field(default_factory=lambda: _NO_DEFAULTS)
    hints: dict[str, str] = field(default_factory=dict[str, str])
    links: list[HyperLink] = field(default_factory=list[HyperLink])

    @property
    def block(self) -> Child:
        return self.child


@dataclass(frozen=True, slots=True)
class Exposure:
    """A port of a child offered to the outside, under `name` or `node:port`."""

    node_id: str
    port_name: str
    name: str | None = None

    @property
    def key(self) -> str:
        return self.name or f"{self.node_id}:{self.port_name}"


@dataclass(frozen=True, slots=True)
class LoopSpec:
    """What is set about one cycle: its id, steps, order inside an iteration, and when to stop early.

    With `grad_steps` gradients flow back through the last so many iterations only. In training, memory holds what was
    computed in each iteration that gradients flow through.
    """

    loop_id: str
    num_steps: int | None = None
    until: Mapping[str, str] | None = None
    order: tuple[str, ...] | None = None
    grad_steps: int | None = None

    def names(self, nodes: Mapping[str, Any]) -> set[str]:
        """The nodes by which these settings find their cycle; none where a lone cycle is meant."""
        named = {*(self.order or ()), self.until.get("node", "") if self.until else ""} - {""}
        return named | {self.loop_id} if self.loop_id in nodes else named

"""Who holds a shared model: the levels whose nodes it stands in, so that nobody's weights are changed unasked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

from wg_core.assembly.roles import WeightAdapter
from wg_core.errors import CheckpointError
from wg_core.execution.block import Block
from wg_core.weights.load import ON_SHARED, Shared
from wg_core.weights.tree import Paths, unique

if TYPE_CHECKING:
    from wg_core.levels.level import Level


def hold(level: Level[Any], child: Any) -> None:
    """Note that `level` has a block with shared models, or an adapter, in one of its nodes."""
    if isinstance(child, Block):
        for block in child.iter_blocks():
            if isinstance(block, WeightAdapter) or block.model_ref() is not None:
                holders = block.__dict__.get("_holders")
                if holders is None:
                    holders = block.__dict__["_holders"] = WeakSet[Any]()
                holders.add(level)


def holders_of(block: Block) -> list[Level[Any]]:
    """The living levels that have the block in one of their nodes now."""
    noted = cast("Iterable[Level[Any]]", block.__dict__.get("_holders", ()))
    return [g for g in noted if any(b is block for n in g.nodes.values() if isinstance(n.child, Block) for b in n.child.iter_blocks())]


def levels_below(children: Iterable[Any]) -> Iterator[Level[Any]]:
    """All levels among and below these children; those that a block runs (its `level`) too."""
    for child in children:
        level = getattr(child, "level", None) if isinstance(child, Block) else child
        nodes = getattr(level, "nodes", None)
        if nodes is not None:
            yield cast("Level[Any]", level)
            yield from levels_below(node.child for node in nodes.values())
        elif level is not None and not isinstance(level, str):
            yield from levels_below(below for _, below in level.parts())


def rejoin(paths: Paths, inside: list[Level[Any]], stored: Mapping[str, str]) -> None:
    """Make those at `paths` one block again that were one when they were stored, by their keys.

    Configuration says this within a graph, and a model reference says it anywhere; between graphs a block without one is
    known as one by its checkpoint alone.
    """
    first: dict[str, Block] = {}
    for path, block in paths:
        one = first.setdefault(stored.get(path, path), block)
        if one is not block and type(one) is type(block) and block.model_ref() is None:
            _replace(block, one, inside)


def _replace(block: Block, by: Block, inside: list[Level[Any]]) -> None:
    for level in inside:
        for node_id, node in list(level.nodes.items()):
            if node.child is block:
                level.replace_block(node_id, by)


def shared_blocks(paths: Paths, inside: list[Level[Any]], on_shared: str) -> Shared:
    """Which blocks at `paths` are held outside the levels `inside`, and with `fork` how copies take their places inside.

    Raises: CheckpointError for a word other than `error` and `fork`.
    """
    if on_shared not in ON_SHARED:
        raise CheckpointError(f"on_shared is {' or '.join(ON_SHARED)}, not {on_shared!r}")
    own = {id(level) for level in inside}
    held: dict[int, str] = {}
    for block in unique(paths).values():
        others = [f"{g.level} {g.id!r}" for g in holders_of(block) if id(g) not in own]
        if others:
            held[id(block)] = ", ".join(sorted(others))

    def fork(block: Block, made: Block) -> None:
        _replace(block, made, inside)

    return Shared(held, fork if on_shared == "fork" else None)

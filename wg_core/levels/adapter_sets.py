"""Where the adapters of a world go: a walk over its blocks, with a line for each that is adapted or passed over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

from wg_core.assembly.models import AdapterSetEntry
from wg_core.assembly.roles import WeightAdapter, role_of
from wg_core.errors import ConfigError, did_you_mean
from wg_core.execution.block import Block
from wg_core.levels.holders import hold
from wg_core.levels.level import Level
from wg_core.levels.remote import Remote
from wg_core.levels.remote_stage import RemoteStage
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from wg_core.levels.stage import Stage
    from wg_core.levels.world import World


@dataclass(frozen=True, slots=True)
class Spot:
    """One adapter of a set: the block that it adapts, its key, and the nodes in whose calls it works."""

    key: str
    block: Block
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterLine:
    """What became of one use of a block: the adapters on it (`set/key`), or why it has none."""

    path: str
    block: str
    adapters: tuple[str, ...] = ()
    reason: str = ""


def spots(world: World, entry: AdapterSetEntry, name: str) -> list[Spot]:
    """The adapters that a set has in a world: one for each block that is chosen, or (`per_stage`) for each in each stage.

    Raises: ConfigError for a target that is no part of the world, and where nothing that is chosen can be adapted.
    """
    uses = list(world.block_paths())
    for target in entry.targets:
        if not any(_meets(target, path, block) for path, block in uses):
            known = [f"{role}/*" for role in world.stages]
            raise ConfigError(
                f"adapter set {name!r}: target {target!r} is no part of world {world.world_id!r}; "
                f"{did_you_mean(target.removeprefix('stage:'), known)}; or role:ROLE"
            )
    found: dict[tuple[str, int], list[str]] = {}
    keys: dict[tuple[str, int], str] = {}
    blocks: dict[int, Block] = {}
    for path, block in uses:
        blocks[id(block)] = block
        part = (path.partition("/")[0] if entry.per_stage else "", id(block))
        keys.setdefault(part, path.replace("/", "."))
        if not why_passed_over(block) and any(_meets(t, path, block) for t in entry.targets):
            found.setdefault(part, []).append(path)
    if not found:
        met = (block for path, block in uses if any(_meets(t, path, block) for t in entry.targets))
        reasons = dict.fromkeys(why_passed_over(block) for block in met)
        raise ConfigError(
            f"adapter set {name!r}: nothing that {', '.join(entry.targets)} chooses in world {world.world_id!r} can be "
            f"adapted: {'; '.join(reasons)}; name blocks that run locally in torch"
        )
    return [Spot(keys[part], blocks[part[1]], tuple(paths)) for part, paths in found.items()]


def _meets(target: str, path: str, block: Block) -> bool:
    kind, colon, glob = target.partition(":")
    if colon and kind == "role":
        return fnmatchcase(role_of(block) or "", glob)
    return fnmatchcase(path, glob if colon and kind == "stage" else target)


def why_passed_over(block: Block) -> str:
    """Why a block cannot have weight adapters; empty where it can. Loads nothing."""
    if isinstance(block, WeightAdapter):
        return "it is an adapter itself"
    if isinstance(block, ModuleBlock):
        return block.fixed
    if block.backend == "api":
        return "it runs behind an API; a text adapter or an output head can learn beside it"
    return "it has no torch weights"


def report(world: World, sets: Mapping[str, Iterable[Spot]]) -> list[AdapterLine]:
    """A line for each use of a block, and for each part that runs elsewhere."""
    lines: list[AdapterLine] = []
    for path, block in world.block_paths():
        on = tuple(f"{name}/{s.key}" for name, found in sets.items() for s in found if s.block is block and path in s.paths)
        lines.append(AdapterLine(path, block.name, on, "" if on else why_passed_over(block) or "no set chooses it"))
    for role, stage in world.stages.items():
        lines += [AdapterLine(f"{role}/{far.id}", far.kind, (), "it runs elsewhere") for far in stage.remotes()]
    return lines


def node_path(path: str) -> str:
    """The path of the node that a block belongs to, which may be a part of that node's block."""
    head, slash, last = path.rpartition("/")
    return f"{head}{slash}{last.partition('.')[0]}"


def twin(stage: Stage, *, trainable: bool) -> Stage:
    """The structure of a stage once more, over the very same blocks, so that it can be set and run by itself.

    `trainable` is for all its blocks.
    """
    if isinstance(stage, RemoteStage):
        return stage
    memo: dict[int, Any] = {}
    _keep(stage, memo)
    copied = deepcopy(stage, memo)
    for level, node in _leaves(copied):
        node.trainable = trainable
        hold(level, node.child)
    return copied


def _keep(level: Level[Any], memo: dict[int, Any]) -> None:
    kept: list[Any] = [*level.hooks, level.resolvers]
    for node in level.nodes.values():
        child = node.child
        kept.append(node.defaults)
        if isinstance(child, Level) and not isinstance(child, Remote):
            _keep(cast("Level[Any]", child), memo)
        else:
            kept.append(child)
    memo.update({id(thing): thing for thing in kept if thing is not None})
    if level._plan is not None:
        memo[id(level._plan)] = None


def _leaves(level: Level[Any]) -> Iterator[tuple[Level[Any], Any]]:
    for node in level.nodes.values():
        if isinstance(node.child, Level) and not isinstance(node.child, Remote):
            yield from _leaves(cast("Level[Any]", node.child))
        elif isinstance(node.child, Block):
            yield level, node


def put_block(stage: Stage, path: str, block: Block) -> None:
    """Put another block into the node at `path` below a stage."""
    level: Any = stage
    *parents, last = path.split("/")
    for part in parents:
        level = level.nodes[part].child
    level.replace_block(last, block)

"""Loading a checkpoint: all or nothing. Everything is read, hashed and compared before any block changes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wg_core.errors import CheckpointError, StateDictError
from wg_core.execution.block import Block, LoadReport, take_over
from wg_core.structure.port import kind_of
from wg_core.weights.checkpoint import ROOT, Store, opened, save_checkpoint
from wg_core.weights.module import ModuleBlock, state_hash
from wg_core.weights.tree import Paths, is_tensor, sub_paths, unique

ON_SHARED = ("error", "fork")


@dataclass(slots=True)
class Shared:
    """Blocks below that others hold too: by id, who does; `fork` says what happens to one that is to be loaded over.

    With `fork` it gets the block and its copy, which has the loaded weights, and puts the copy in the block's places.
    """

    held: Mapping[int, str] = field(default_factory=dict[int, str])
    fork: Callable[[Block, Block], None] | None = None


def load_checkpoint(
    paths: Paths,
    source: Path | str,
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    verify: bool = True,
    shared: Shared | None = None,
) -> LoadReport:
    """Load a checkpoint into the blocks at `paths`; the format is seen from `source`, and nothing changes if it raises.

    `rename` maps paths in the checkpoint to paths here, with all below them. With `verify` file hashes are compared.
    What a checkpoint of a smaller scope lacks stays as it is, and stands in the report as missing.

    Raises: FileNotFoundError; CheckpointError for what is unreadable, for blocks that others hold too, for a part of a
    block that was trained over other weights than are here, and (with `strict`) for blocks that only one side has;
    StateDictError for a wrong shape or kind, and (with `strict`) for missing or unexpected keys.
    """
    here = list(paths)
    with opened(source, verify) as store:
        match = _Match(here, store, rename or {})
        forks = match.forks(shared or Shared())
        with _weightless(match, strict):
            report, ready = match.compare(strict)
            take_over(ready)
        if shared is not None and shared.fork is not None:
            for block, fork in forks:
                shared.fork(block, fork)
    return report


class _Match:
    """What is here beside what is stored."""

    def __init__(self, here: list[tuple[str, Block]], store: Store, rename: Mapping[str, str]) -> None:
        self.here = here
        self.store = store
        self.rename = rename
        self.stored = _renamed(store, store.paths, rename, must=True)
        lacks = _renamed(store, store.lacks, rename)
        self.key: dict[int, str] = {}
        self.lacks: dict[int, set[str]] = {}
        for path, block in here:
            if path in self.stored:
                self.key.setdefault(id(block), self.stored[path])
            if path in lacks:
                self.lacks.setdefault(id(block), set()).update(lacks[path])
        self.into: dict[int, Block | None] = {}  # what takes the state of a block's key; None where it is equal

    def resting(self, block: Block) -> bool:
        """Whether the checkpoint says itself that it has nothing for a block."""
        return id(block) not in self.key and id(block) in self.lacks

    def forks(self, shared: Shared) -> list[tuple[Block, Block]]:
        """Copies of what others hold too and would be loaded over. Raises: CheckpointError where none may be made."""
        taken: list[str] = []
        made: list[tuple[Block, Block]] = []
        for path, block in unique(self.here).items():
            key = self.key.get(id(block))
            if id(block) not in shared.held or key is None:
                continue
            if _equal(block, self.store.state(key)):
                self.into[id(block)] = None
            elif shared.fork is None:
                taken.append(f"{path} (held by {shared.held[id(block)]})")
            elif block.get_sub_blocks() or "." in path:
                raise CheckpointError(
                    f"{path} is made of blocks, or part of one, and shared with {shared.held[id(block)]}, so it cannot "
                    "be forked; give it reuse: false, or load into a level of its own pool; nothing was loaded"
                )
            else:
                fork = self.into[id(block)] = block.fork(f"fork_{self.store.content_hash(key)[:12]}")
                made.append((block, fork))
        if taken:
            raise CheckpointError(
                f"{self.store.source}: others share the blocks {', '.join(taken)}, and loading would change them there; "
                "nothing was loaded. Pass on_shared='fork' for copies of their own here, or load with a pool of its own"
            )
        return made

    def compare(self, strict: bool) -> tuple[LoadReport, list[tuple[Block, dict[str, Any]]]]:
        """What each block is to take over, and what is missing or unexpected.

        Raises: CheckpointError, StateDictError as `load_checkpoint`.
        """
        missing, unexpected, lacked = self._owners(strict)
        wrong: list[str] = []
        ready: list[tuple[Block, dict[str, Any]]] = []
        for path, block in unique(self.here).items():
            key, target = self.key.get(id(block)), self.into.get(id(block), block)
            if key is None or target is None:
                continue
            given, own = self.store.state(key), target.own_state_dict()
            for k in own:
                if k not in given:
                    (lacked if k in self.lacks.get(id(block), ()) else missing).append(f"{path}:{k}")
            unexpected += [f"{path}:{k}" for k in given if k not in own]
            wrong += [
                f"{path}:{k} is {kind_of(given[k])}, not {kind_of(own[k])}"
                for k in own
                if k in given and _unlike(own[k], given[k])
            ]
            ready.append((target, {k: given.get(k, v) for k, v in own.items()}))
        self._compare_left_out()
        if wrong or (strict and (missing or unexpected)):
            raise StateDictError(
                f"{self.store.source} does not fit, nothing was loaded: missing {missing}, "
                f"unexpected {unexpected}, wrong shape or kind {wrong}"
            )
        return LoadReport((*missing, *lacked), tuple(unexpected)), ready

    def _compare_left_out(self) -> None:
        """Raises: CheckpointError where what was stored was trained over other weights than are here."""
        first = unique(self.here)
        for path, revision in _renamed(self.store, self.store.revisions, self.rename).items():
            block = first.get(path)
            if block is None:
                continue
            own = self.into.get(id(block), block) or block
            state = own.own_state_dict()
            found = state_hash({name: state[name] for name in revision["names"] if name in state})
            if found != revision["sha256"]:
                raise CheckpointError(
                    f"{self.store.source} (scope {self.store.index['scope']}) was made where {path} had been trained before, "
                    f"and does not hold that: its weights_revision is {revision['sha256']}, of the weights here {found}; "
                    "load what was trained before first, or save with scope='all'; nothing was loaded"
                )

    def _owners(self, strict: bool) -> tuple[list[str], list[str], list[str]]:
        here, stored, store = self.here, self.stored, self.store
        known = {p for p, _ in here}
        unexpected = [p for p in stored if p not in known]
        missing: list[str] = []
        lacked: list[str] = []
        for path, block in unique(here).items():
            keys = {stored[p] for p, b in here if b is block and p in stored}
            if len(keys) > 1:
                shared = [p for p, b in here if b is block]
                raise CheckpointError(
                    f"{store.source}: {shared} are one block here but {len(keys)} there; nothing was loaded"
                )
            if self.resting(block):
                lacked.append(path)
            elif not keys and block.own_state_dict():
                missing.append(path)
        if strict and (missing or unexpected):
            raise CheckpointError(
                f"{store.source} (of a {store.index.get('kind')}) does not fit: it lacks the blocks {missing} "
                f"and has unknown {unexpected}; nothing was loaded. Pass rename={{old: new}}, or strict=False"
            )
        return missing, unexpected, lacked


@contextmanager
def _weightless(match: _Match, strict: bool) -> Generator[None]:
    """Build modules that are not there yet, without reading the references that a strict load replaces anyway."""
    built: list[ModuleBlock] = []
    try:
        targets = [(b, match.into.get(id(b), b)) for b in unique(match.here).values() if not match.resting(b)]
        lazy = [(b, t) for b, t in targets if isinstance(t, ModuleBlock) and not t.materialized]
        for block, target in sorted(lazy, key=lambda pair: pair[1].leans_on is not None):
            built.append(target)
            key = match.key.get(id(block))
            if key is not None:
                target.expect_state(match.store.state(key))
            target.build(read_reference=not strict or id(block) in match.lacks)
        yield
    except BaseException:
        for block in built:
            block.unload()
        raise


def _renamed(store: Store, paths: Mapping[str, Any], rename: Mapping[str, str], *, must: bool = False) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    used: set[str] = set()
    for path, value in paths.items():
        for old, new in rename.items():
            if path == old or path.startswith((f"{old}/", f"{old}.")):
                path = new + path[len(old) :]
                used.add(old)
                break
        moved[path] = value
    unused = sorted(set(rename) - used)
    if unused and must:
        raise CheckpointError(
            f"{store.source}: rename names {unused[0]!r}, which it does not hold; it has {sorted(store.paths)}"
        )
    return moved


def _unlike(own: Any, given: Any) -> bool:
    if is_tensor(own) != is_tensor(given):
        return True
    if not is_tensor(own):
        return False
    return own.shape != given.shape or (own.is_floating_point() or own.is_complex()) != (
        given.is_floating_point() or given.is_complex()
    )


def _equal(block: Block, given: Mapping[str, Any]) -> bool:
    """Whether a block that is there already has this very state; asks for no weights that are not."""
    if isinstance(block, ModuleBlock) and not block.materialized:
        return False
    own = block.own_state_dict()
    return own.keys() == given.keys() and all(_same(own[k], given[k]) for k in own)


def _same(own: Any, given: Any) -> bool:
    if not (is_tensor(own) and is_tensor(given)):
        return not is_tensor(own) and not is_tensor(given) and bool(own == given)
    return own.shape == given.shape and own.dtype == given.dtype and bool((own.detach().cpu() == given).all())


# ---- the doors of a block --------------------------------------------------------------------------------------------


class BlockCheckpoints:
    """Saves and loads one block with its sub-blocks."""

    def save(self, block: Block, path: Path | str, *, format: str, backend: str) -> Path:
        return save_checkpoint(sub_paths(ROOT, block), path, kind="block", format=format, backend=backend)

    def load(
        self, block: Block, path: Path | str, *, strict: bool, rename: Mapping[str, str] | None, verify: bool
    ) -> LoadReport:
        return load_checkpoint(sub_paths(ROOT, block), path, strict=strict, rename=rename, verify=verify)


Block.checkpoints = BlockCheckpoints()

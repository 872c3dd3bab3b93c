"""Several worlds make a step together: what they want of one model at the same time is computed as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from wg_core.errors import ConfigError, JointStepError
from wg_core.execution.context import Hook
from wg_core.execution.drive import Batched, drive_batched, together
from wg_core.execution.modes import modes
from wg_core.levels.flow import Flow, with_budget
from wg_core.levels.world import World
from wg_core.state.store import Snapshot

Done = TypeVar("Done")


def step_together(
    worlds: Sequence[World],
    *,
    action: str | None = None,
    seed: int | None = None,
    hooks: Sequence[Hook] = (),
    **options: Any,
) -> list[Snapshot]:
    """One step of each world, as `World.step` makes it; the snapshots, in order.

    Worlds that share a model (by their pool, as a base and its LoRA worlds do) ask it together: see
    `Block.batch_forward`. What a world makes is what it makes alone but for the rounding of a batch. `action`, `seed`,
    `hooks` and `options` are for every world, and a `budget` is for all of them together; hooks of one world are in its
    `hooks`. The seconds of a stage are those that passed, in which others were written too.

    Raises: JointStepError where a world fails: the others are published all the same; ConfigError for a world that is
    given twice, or that is to be trained.
    """
    ids = [world.world_id for world in worlds]
    for id in ids:
        if ids.count(id) > 1:
            raise ConfigError(f"world {id!r} is given {ids.count(id)} times; give each world once, a fork has an id of its own")
    if options.get("training"):
        raise ConfigError("worlds are not trained while they step together; step them one by one")
    options = with_budget(options)

    def step(world: World) -> Batched[Snapshot]:
        def run(role: str, flow: Flow) -> Batched[Flow]:
            return drive_batched(world.driven(role), world.stage_session(role, flow, hooks, options))

        return world.stepping(run, hooks, action=action, seed=seed)

    with modes((block for world in worlds for block in world.iter_blocks()), None):
        done = together([_kept(step(world)) for world in worlds])
    snapshots = {id: found for id, found in zip(ids, done, strict=True) if isinstance(found, Snapshot)}
    errors = {id: found for id, found in zip(ids, done, strict=True) if isinstance(found, Exception)}
    if errors:
        said = "; ".join(f"{id}: {type(error).__name__}: {error}" for id, error in errors.items())
        others = ", ".join(f"{id} step {made.step}" for id, made in snapshots.items()) or "none"
        raise JointStepError(
            f"{len(errors)} of {len(ids)} worlds failed; published: {others}; {said}", errors=errors, snapshots=snapshots
        ) from next(iter(errors.values()))
    return list(snapshots.values())


def _kept(run: Batched[Done]) -> Batched[Done | Exception]:
    """A run whose failure is its result, so that the others go on."""
    try:
        return (yield from run)
    except Exception as error:
        return error

"""Checks on what is published."""

import dagster as dg

from resources.worlds import WorldPool
from wg_core.errors import WGError
from wg_core.state.store import SnapshotStore
from wg_defs.partitions import step_of
from wg_defs.worlds import WorldFile


def chain_check(file: WorldFile) -> dg.AssetChecksDefinition:
    """The check that every snapshot names the one before it and that stored bytes match their hashes."""

    @dg.asset_check(
        asset=dg.AssetKey([file.world_id, "snapshot"]),
        name="chain",
        description="Every snapshot names its parent, and every stored byte matches its hash. "
        "After a step only its own link is looked at; run alone, the check reads the whole history.",
    )
    def chain(context: dg.AssetCheckExecutionContext, worlds: WorldPool) -> dg.AssetCheckResult:
        store = worlds.world(file.path).store
        steps = store.steps(file.world_id)
        if context.has_partition_key:
            problems = link_problems(store, file.world_id, step_of(context.partition_key))
        else:
            problems = store.verify(file.world_id)
        shown = {"steps": dg.MetadataValue.int(len(steps)), "whole_history": not context.has_partition_key}
        if problems:
            shown["problems"] = dg.MetadataValue.md("\n".join(f"- {problem}" for problem in problems[:50]))
        return dg.AssetCheckResult(passed=not problems, metadata=shown)

    return chain


def link_problems(store: SnapshotStore, world_id: str, step: int) -> list[str]:
    """What is wrong between the snapshot of `step` and the one before it."""
    try:
        snapshot = store.get(world_id, step)
        before = store.get(world_id, step - 1).id if step and snapshot.origin is None else None
    except WGError as error:
        return [str(error)]
    return [] if snapshot.parent == before else [f"step {step}: its parent is {snapshot.parent}, not {before}"]

"""What can be said about a world without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from wg_core.assembly.models import UPDATE
from wg_core.errors import ConfigError
from wg_core.execution.validate import Issue, Severity
from wg_core.levels.stage import CONTRACTS
from wg_core.state.state import State

if TYPE_CHECKING:
    from wg_core.levels.world_structure import WorldStructure


def world_issues(world: WorldStructure, deep: bool, for_training: bool = False) -> Iterator[Issue]:
    """What is wrong with the world itself, then (deep) with its stages."""
    canonical = world.canonical

    def issue(code: str, message: str, hint: str, at: str = "", severity: Severity = "error") -> Issue:
        return Issue(severity, code, f"{world.world_id}/{at}" if at else world.world_id, message, hint)

    lacking = [name for name in world.cycle if name != UPDATE and name not in world.stages]
    idle = [name for name in world.stages if name not in world.cycle]
    if lacking:
        lack = f"world {world.world_id!r} lacks the stages {', '.join(lacking)}"
        yield issue("STAGE_MISSING", lack, "add_stage, or another cycle with set_cycle")
    if idle:
        yield issue("STAGE_IDLE", f"the cycle leaves out the stages {', '.join(idle)}", "name each once in the cycle")
    if not canonical and UPDATE not in world.cycle:
        yield issue("NO_UPDATE", "the cycle has no world_update", "the content will never change", severity="warning")
    for id in world.linked_ids():
        if world.find_end_world(id) is None:
            where = "put its folder into worlds/ or a folder of WG_WORLDS"
            yield issue("LINK_UNRESOLVED", f"the linked end world {id!r} is not found", where, severity="warning")
    for name, stage in world.stages.items():
        contract = CONTRACTS.get(name) if canonical else None
        if contract is not None and (stage.reads, stage.writes) != contract:
            yield issue(
                "CONTRACT",
                f"the stage reads {list(stage.reads)} and writes {list(stage.writes)}; in this cycle it reads "
                f"{list(contract[0])} and writes {list(contract[1])}",
                "leave reads and writes out, or give a cycle of your own",
                name,
            )
        written = stage.mapping_config()
        paths = [p for p in written.get("inputs", {}).values() if p.partition(".")[0] in stage.reads]
        paths += [p for p in written.get("outputs", {}) if p.partition(".")[0] in stage.writes]
        paths += [p for condition in stage.execution_condition.values() for p in condition]
        try:
            for path in paths:
                State.check_path(path, schema=world.state_schema)
        except ConfigError as error:
            yield issue("MAPPING", str(error), "", name)
        for found in stage.validate(strict=False, deep=deep, for_training=for_training).issues:
            path = f"{world.world_id}/{name}/{found.path.partition('/')[2]}".rstrip("/")
            yield replace(found, path=path)

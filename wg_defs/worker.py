"""Many steps in one process: models are loaded once, and every step is a run on the page like any other."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from wg_core.errors import ConfigError
from wg_defs.build import build
from wg_defs.instance import open_instance, prepare, reap
from wg_defs.jobs import evolve_name
from wg_defs.partitions import add_steps, key_of
from wg_defs.step import last_step
from wg_defs.worlds import world_file

log = logging.getLogger("wg_defs")


@dataclass(frozen=True)
class Evolved:
    """One step that the worker ran."""

    step: int
    partition: str
    run_id: str
    ok: bool
    snapshot: str = ""
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def evolve(
    world_name: str,
    steps: int = 1,
    *,
    until: int | None = None,
    action: str | None = None,
    seed: int | None = None,
    budget: Mapping[str, float] | None = None,
    profile: str | None = None,
    folders: Sequence[Path] | None = None,
    root: Path | None = None,
    instance: dg.DagsterInstance | None = None,
    mlflow: bool | None = None,
    on_step: Callable[[Evolved], None] | None = None,
) -> list[Evolved]:
    """Run the next `steps` steps of a world one after the other, or all up to step `until`; stop at a failure.

    `action` and `seed` belong to the first of them, `budget` (`{calls, tokens, cost}`) and `profile` to each. Every step is a run of
    the job `<world>__evolve` on the instance that the page shows; `on_step` is called after each. Values and tracking
    lie below `root` (`WG_HOME`).

    Raises: ConfigError for an unknown world, a broken file or a bad number.
    """
    from wg_core.levels.world import World

    if until is None and steps < 1:
        raise ConfigError(f"steps: {steps} is less than 1")
    file = world_file(world_name, folders)
    world = World.from_yaml(file.path)
    last = last_step(world)
    if until is not None:
        steps = max(0, until - last)
    owned = open_instance() if instance is None else None
    on = instance or owned
    assert on is not None
    try:
        for run_id in reap(on):
            log.warning("closed run %s, whose process was killed", run_id)
        prepare(on, file.world_id, last)
        job = build([Path(file.path)], root=root, mlflow=mlflow).resolve_job_def(evolve_name(file.world_id))
        done: list[Evolved] = []
        for number in range(steps):
            asked: dict[str, Any] = {"action": action, "seed": seed} if number == 0 else {}
            asked |= {"budget": dict(budget)} if budget else {}
            asked |= {"profile": {"kind": profile}} if profile else {}
            done.append(_one(job, on, file.world_id, last_step(world) + 1, asked))
            if on_step is not None:
                on_step(done[-1])
            if not done[-1].ok:
                break
        return done
    finally:
        if owned is not None:
            owned.dispose()


def _one(
    job: dg.JobDefinition, instance: dg.DagsterInstance, world_id: str, step: int, asked: dict[str, Any]
) -> Evolved:
    add_steps(instance, world_id, step - 1, 1)
    asked = {name: value for name, value in asked.items() if value is not None}
    result = job.execute_in_process(
        instance=instance,
        partition_key=key_of(step),
        run_config={
            "ops": {f"{world_id}__step": {"config": asked}},
            "loggers": {"console": {"config": {"log_level": "ERROR"}}},
        },
        tags={"wg/worker": "evolve"},
        raise_on_error=False,
    )
    failed = next((event for event in result.all_events if event.is_step_failure), None)
    if failed is not None:
        said = failed.step_failure_data.user_failure_data
        error = failed.step_failure_data.error
        text = said.description if said and said.description else error.message if error else "the step failed"
        return Evolved(step, key_of(step), result.run_id, False, error=text.strip())
    made = result.asset_materializations_for_node(f"{world_id}__step")
    snapshot = next((str(m.metadata["snapshot"].value) for m in made if m.asset_key.path[-1] == "snapshot"), "")
    return Evolved(step, key_of(step), result.run_id, result.success, snapshot=snapshot)

"""The jobs of a world: one step, and more steps to launch."""

import dagster as dg

from resources.worlds import WorldPool
from wg_defs.instance import prepare
from wg_defs.partitions import add_steps
from wg_defs.step import last_step
from wg_defs.worlds import WorldFile

STEP_SECONDS = 6 * 3600


def evolve_name(world_id: str) -> str:
    """The name of the job that makes one step."""
    return f"{world_id}__evolve"


def evolve_job(file: WorldFile, assets: dg.AssetsDefinition) -> dg.JobDefinition:
    """One step of the world: all its stages and the snapshot."""
    return dg.define_asset_job(
        evolve_name(file.world_id),
        selection=dg.AssetSelection.assets(*assets.keys).without_checks()
        | dg.AssetSelection.checks(*assets.check_keys),
        description=f"One step of {file.title}. Pick one step; several steps are a backfill and run in order.",
        tags={"dagster/max_runtime": str(STEP_SECONDS), "wg/world": file.world_id},
    )


class MoreSteps(dg.Config):
    """How many steps to make ready to launch."""

    count: int = 5


def add_steps_job(file: WorldFile) -> dg.JobDefinition:
    """Adds the keys of the next steps, so that a backfill over them can be launched from the page."""

    @dg.op(name=f"{file.world_id}__add_keys", description="Add the keys of the next `count` steps, in order.")
    def add_keys(context: dg.OpExecutionContext, config: MoreSteps, worlds: WorldPool) -> None:
        if not 1 <= config.count <= 1000:
            raise dg.Failure(f"count: {config.count} is outside 1 .. 1000", allow_retries=False)
        published = last_step(worlds.world(file.path))
        prepare(context.instance, file.world_id, published)
        new = add_steps(context.instance, file.world_id, published, config.count)
        context.log.info("steps ready to launch: %s", ", ".join(new) or "no new ones; they were there")

    @dg.job(name=f"{file.world_id}__add_steps", description=add_steps_job.__doc__, tags={"wg/world": file.world_id})
    def job():
        add_keys()

    return job

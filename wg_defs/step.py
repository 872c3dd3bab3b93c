"""One step of a world as a graph of assets: begin, the stages of the cycle, snapshot."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from resources.mlflow_tracker import MlflowTracker
from resources.worlds import WorldPool
from wg_core.errors import ApiRateLimitError, ApiTimeoutError, OutputContractError, SnapshotConflictError, WGError
from wg_core.state.canonical import sha256_json
from wg_core.structure.ids import safe_path
from wg_defs import metadata as md
from wg_defs.instance import PROCESS_TAG, pool_name, prepare, process_tag, reap
from wg_defs.launch import Launch, launch_mapping
from wg_defs.partitions import key_of, step_of, steps_of
from wg_defs.worlds import WorldFile

if TYPE_CHECKING:
    from wg_core.levels.flow import Flow
    from wg_core.levels.world import World

PASSING = (ApiRateLimitError, ApiTimeoutError)
"""Errors that a second try may not see."""


def step_assets(file: WorldFile, root: Path) -> dg.AssetsDefinition:
    """The assets of a world, all made by one graph: `[world, stage]` for each stage, and `[world, snapshot]`.

    Profiles that a launch asks for are written below `root`.
    """
    begin = _begin_op(file)
    stages = {role: _stage_op(file, role, root) for role in file.roles}
    snapshot = _snapshot_op(file)
    contracts = {role: contract_spec(file.world_id, role) for role in file.roles}
    names = [*file.roles, "snapshot"]
    outs = {name: dg.GraphOut() for name in names}
    outs.update({spec.get_python_identifier(): dg.GraphOut() for spec in contracts.values()})

    @dg.graph(
        name=f"{file.world_id}__step",
        description=f"One step of {file.title}: {', '.join(file.roles)}, then a snapshot.",
        out=outs,
        config=launch_mapping("begin"),
    )
    def step():
        results = {}
        flow = begin.alias("begin")()
        for role, stage in stages.items():
            done = stage.alias(role)(flow)
            flow = done.flow
            results[role] = done.asset
            results[contracts[role].get_python_identifier()] = done.contract
        results["snapshot"] = snapshot.alias("snapshot")(flow)
        return results

    keys = {name: dg.AssetKey([file.world_id, name]) for name in names}
    before = dict(zip(names[1:], names[:-1], strict=True))
    return dg.AssetsDefinition.from_graph(
        step,
        keys_by_output_name=keys,
        internal_asset_deps={name: {keys[before[name]]} if name in before else set() for name in names},
        check_specs=list(contracts.values()),
        partitions_def=steps_of(file.world_id),
        group_name=file.world_id,
        code_versions_by_output_name=dict.fromkeys(names, file.code_version),
        descriptions_by_output_name={**{role: _about(file, role) for role in file.roles}, "snapshot": _about(file, "")},
        metadata_by_output_name={name: {"world_file": dg.MetadataValue.path(file.path)} for name in names},
    )


def contract_spec(world_id: str, role: str) -> dg.AssetCheckSpec:
    """The check that a stage kept its contract over the state; when it fails, no later stage runs."""
    return dg.AssetCheckSpec(
        "contract",
        asset=dg.AssetKey([world_id, role]),
        blocking=True,
        description="The stage filled the blocks that it declares and touched no other.",
    )


def _begin_op(file: WorldFile) -> dg.OpDefinition:
    @dg.op(
        name=f"{file.world_id}__begin",
        description="Take up the snapshot of the step before; refuse when it is missing or this step is published.",
        out={"flow": dg.Out(is_required=False, description="Everything that the step carries from stage to stage.")},
        pool=pool_name(file.world_id),
    )
    def begin(context: dg.OpExecutionContext, config: Launch, worlds: WorldPool, tracker: MlflowTracker):
        with failures(context):
            step = step_of(context.partition_key)
            context.instance.add_run_tags(context.run.run_id, {PROCESS_TAG: process_tag()})
            for run_id in reap(context.instance):
                context.log.warning("closed run %s, whose process was killed", run_id)
            world = worlds.world(file.path)
            prepare(context.instance, file.world_id, last_step(world))
            flow = begin_step(world, step, config)
            if flow is None:
                report = json.dumps(world.dry_run(), indent=1, default=str)
        if flow is None:
            context.log.info("dry run of step %s: the cycle is sound, nothing was made", context.partition_key)
            key = dg.AssetKey([file.world_id, "snapshot"])
            shown = {"dry_run": dg.MetadataValue.md(f"```json\n{report}\n```")}
            context.log_event(dg.AssetObservation(key, partition=context.partition_key, metadata=shown))
            return
        params = {"action": config.action, "seed": flow.seed, "config_hash": flow.config_hash, "world_file": file.path}
        tracking = tracker.start(file.world_id, step, context.run.run_id, params)
        yield dg.Output({"flow": flow.model_dump(mode="json"), "tracking": tracking, "profile": config.profile}, "flow")

    return begin


def last_step(world: "World") -> int:
    """The last published step of `world`, -1 if there is none."""
    steps = world.store.steps(world.world_id)
    return steps[-1] if steps else -1


def begin_step(world: "World", step: int, launch: Launch) -> "Flow | None":
    """Begin `step` of `world`; None for a dry run.

    A published step may be run again as it was: without launch config it takes its recorded action and seed.

    Raises: dg.Failure if the step before is missing, or if the step is published and the launch config differs.
    """
    last = last_step(world)
    if step > last + 1:
        raise dg.Failure(
            f"step {step} of {world.world_id} goes on from step {step - 1}, which is not there: the last published "
            f"step is {'none' if last < 0 else last}. Materialize partition {key_of(last + 1)} first, or run: "
            f"wg evolve {world.world_id} --steps {step - last}",
            metadata={"missing_step": dg.MetadataValue.int(last + 1)},
            allow_retries=False,
        )
    if launch.dry_run:
        return None
    if step <= last:
        return _begin_again(world, step, launch)
    parent = world.store.head(world.world_id)
    return world.begin(
        state=launch.initial_state, action=launch.action, seed=launch.seed, parent=parent, budget=limits_of(launch)
    )


def _begin_again(world: "World", step: int, launch: Launch) -> "Flow":
    from wg_core.levels.world import default_owner

    published = world.store.get(world.world_id, step)
    asked = {"action": launch.action, "seed": launch.seed, "initial_state": launch.initial_state}
    had = {"action": published.action, "seed": published.seed, "initial_state": published.given}
    changed = [name for name, value in asked.items() if value is not None and value != had[name]]
    if published.origin is not None:
        raise already_published(world.world_id, step, f"as the fork of {published.origin.world}@{step}")
    if changed:
        raise already_published(world.world_id, step, f"with another {' and '.join(changed)}")
    owner = default_owner()
    flow = world.beginning_of(published, owner=owner, epoch=world.store.acquire(world.world_id, owner))
    return flow.model_copy(update={"budget": limits_of(launch)})


def limits_of(launch: Launch) -> dict[str, float]:
    """The budget that was asked for; calls and tokens are whole numbers."""
    return {n: limit if n == "cost" else int(limit) for n, limit in (launch.budget or {}).items()}


def already_published(world_id: str, step: int, why: str) -> dg.Failure:
    """History does not change: the way to another outcome is a fork."""
    way = f"wg fork {world_id}@{step - 1} NEW_NAME" if step else "wg new NEW_NAME"
    return dg.Failure(
        f"step {step} of {world_id} is published {why}, and history does not change; for another course run: {way}",
        metadata={"published_step": dg.MetadataValue.int(step)},
        allow_retries=False,
    )


def hold(world: "World", flow: "Flow") -> "Flow":
    """Keep the world's lease for another stage; a run that goes on after a failure takes it anew.

    Raises: StaleOwnerError if another run took the world over.
    """
    lease = world.store.lease(world.world_id)
    if lease is not None and lease.epoch == flow.epoch and lease.owner is None:
        return flow.model_copy(update={"epoch": world.store.acquire(world.world_id, flow.owner)})
    world.store.renew(world.world_id, flow.epoch)
    return flow


def _stage_op(file: WorldFile, role: str, root: Path) -> dg.OpDefinition:
    key = dg.AssetKey([file.world_id, role])

    @dg.op(
        name=f"{file.world_id}__{role}",
        description=_about(file, role),
        out={"flow": dg.Out(), "asset": dg.Out(), "contract": dg.Out()},
        pool=pool_name(file.world_id),
    )
    def stage(context: dg.OpExecutionContext, flow: dict[str, Any], worlds: WorldPool, tracker: MlflowTracker):
        from wg_core.levels.flow import Flow
        from wg_core.weights.profiling import Profile

        world = worlds.world(file.path)
        tracking, profile = flow["tracking"], Profile(flow["profile"]) if flow.get("profile") else None
        before = Flow.model_validate(flow["flow"])
        tags = {"dagster/run_id": context.run.run_id, "wg/world": file.world_id, "wg/step": context.partition_key}
        try:
            with failures(context), tracker.stage(tracking, role, tags) as calls, profile or nullcontext():
                before = hold(world, before)
                after = world.run_stage(role, before, hooks=[calls, *([profile] if profile else [])])
        except BaseException as failure:
            world.abandon(before)
            tracker.finish(tracking, "FAILED", {}, step_of(context.partition_key), {"wg/failed_stage": role})
            if isinstance(failure.__cause__, OutputContractError):
                broken = {"broken": str(failure.__cause__)}
                yield dg.AssetCheckResult(passed=False, asset_key=key, check_name="contract", metadata=broken)
            raise
        data = after.model_dump(mode="json")
        record = data["stages"][-1]
        shown = md.record_metadata(record) | _blocks_shown(record, data["state"], world) | md.node_table(calls.nodes)
        if profile is not None:
            folder = safe_path(root, "profiles", file.world_id, context.partition_key, context.run.run_id[:8])
            shown |= md.profile(profile.table(), profile.write(folder, role))
        if calls.trace_id:
            shown["mlflow_trace_id"] = dg.MetadataValue.text(calls.trace_id)
        if calls.error:
            shown["mlflow_error"] = dg.MetadataValue.text(calls.error)
        yield dg.AssetCheckResult(
            passed=True, asset_key=key, check_name="contract", metadata={"reason": record.get("reason") or "ran"}
        )
        yield dg.Output({**flow, "flow": data}, "flow")
        yield dg.Output(
            {"record": record, "state": data["state"]},
            "asset",
            metadata=shown,
            data_version=dg.DataVersion(sha256_json(data["state"])),
            tags=None if record["ran"] else {"wg/skipped": "true"},
        )

    return stage


def _snapshot_op(file: WorldFile) -> dg.OpDefinition:
    @dg.op(
        name=f"{file.world_id}__snapshot",
        description="Publish the step as one immutable snapshot.",
        pool=pool_name(file.world_id),
    )
    def snapshot(context: dg.OpExecutionContext, flow: dict[str, Any], worlds: WorldPool, tracker: MlflowTracker):
        from wg_core.levels.flow import Flow

        world = worlds.world(file.path)
        tracking = flow["tracking"]
        step = step_of(context.partition_key)
        was = step <= last_step(world)
        try:
            with failures(context):
                done = hold(world, Flow.model_validate(flow["flow"]))
                try:
                    snap = world.commit(done, run={"dagster_run_id": context.run.run_id, **_run_ids(tracking)})
                except SnapshotConflictError as error:
                    if was:
                        raise already_published(file.world_id, step, "with another result") from error
                    raise
        except BaseException:
            tracker.finish(tracking, "FAILED", {}, step, {"wg/failed_stage": "snapshot"})
            raise
        prepare(context.instance, file.world_id, last_step(world))
        records = [record.model_dump(mode="json") for record in snap.stages]
        total = md.totals(records)
        error = tracker.finish(tracking, "FINISHED", total, step, {"wg/snapshot": snap.id})
        shown = {
            "story": dg.MetadataValue.md(md.story(snap.applied or snap.carried)),
            "intent": dg.MetadataValue.md(md.block_markdown("intent", snap.carried.get("intent"))),
            **md.picture(snap.carried, world.store.blobs),
            "stages": md.stage_table(records),
            **md.numbers(records),
            "snapshot": dg.MetadataValue.text(snap.id),
            "parent_version": dg.MetadataValue.text(snap.parent or ""),
            "seed": dg.MetadataValue.text(str(snap.seed)),
            "action": dg.MetadataValue.text(snap.action or ""),
            "config_hash": dg.MetadataValue.text(snap.config_hash),
            "models": dg.MetadataValue.text(", ".join(snap.models)),
            "published": dg.MetadataValue.text("before, with the same id: nothing changed" if was else "now"),
            **tracker.metadata(tracking),
        }
        if error:
            shown["mlflow_error"] = dg.MetadataValue.text(error)
        if was:
            context.log.info("step %s was published before with the same id %s: nothing changed", step, snap.id)
        value = {"world_id": file.world_id, "step": step, "id": snap.id, "parent": snap.parent}
        yield dg.Output(value, metadata=shown, data_version=dg.DataVersion(snap.id))

    return snapshot


@contextmanager
def failures(context: dg.OpExecutionContext) -> Iterator[None]:
    """Turn an error of the engine into a failure whose first line is the engine's message."""
    try:
        yield
    except WGError as error:
        raise dg.Failure(
            str(error),
            metadata={"error": dg.MetadataValue.text(type(error).__name__)},
            allow_retries=isinstance(error, PASSING) or isinstance(error.__cause__, PASSING),
        ) from error


def _run_ids(tracking: Mapping[str, str]) -> dict[str, str]:
    return {f"mlflow_{name}": tracking[name] for name in ("run_id", "url") if tracking.get(name)}


def _blocks_shown(record: Mapping[str, Any], state: Mapping[str, Any], world: "World") -> dict[str, dg.MetadataValue]:
    shown: dict[str, dg.MetadataValue] = {}
    for name in md.block_names(record.get("wrote") or ()):
        if name == "artifacts":
            shown.update(md.picture(state, world.store.blobs))
        if name in state:
            shown[name] = dg.MetadataValue.md(md.block_markdown(name, state[name]))
    return shown


_TASKS = {
    "philosopher": "Looks at the artifacts and describes what is seen in them.",
    "author": "Tells what really happened, and which things changed.",
    "world_update": "Applies the finished state to the world's content.",
    "development": "Decides what should happen next, with the action if one is given.",
    "architect": "Plans how the next artifacts are made.",
    "creator": "Makes the artifacts.",
    "": "The published step: one immutable document, named by the hash of its content.",
}


def _about(file: WorldFile, role: str) -> str:
    return f"{_TASKS.get(role, f'Stage {role}.')}\n\n{file.title}. {file.description}".strip()

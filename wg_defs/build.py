"""From world files to Dagster's definitions."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from resources.mlflow_tracker import MlflowTracker
from resources.values import JsonValues
from resources.worlds import WorldPool
from wg_core.state.home import home
from wg_defs.checks import chain_check
from wg_defs.jobs import add_steps_job, evolve_job
from wg_defs.step import step_assets
from wg_defs.worlds import BrokenFile, read_worlds


def build(
    folders: Sequence[Path] | None = None, *, root: Path | None = None, mlflow: bool | None = None
) -> dg.Definitions:
    """The definitions of all worlds in `folders`, with all data below `root` (`WG_HOME`).

    `mlflow` turns tracking off or on; by default it is on unless `WG_MLFLOW=off`.
    """
    worlds, broken = read_worlds(folders)
    root = (root or home()).absolute()
    assets: list[dg.AssetsDefinition | dg.AssetSpec] = [_broken_asset(file) for file in broken]
    checks: list[dg.AssetChecksDefinition] = []
    jobs: list[dg.JobDefinition] = []
    for file in worlds:
        steps = step_assets(file)
        assets.append(steps)
        checks.append(chain_check(file))
        jobs += [evolve_job(file, steps), add_steps_job(file)]
    return dg.Definitions(
        assets=assets,
        asset_checks=checks,
        jobs=jobs,
        resources={
            "worlds": WorldPool(),
            "tracker": MlflowTracker(
                tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow/mlflow.db",
                artifacts=str(root / "mlflow" / "artifacts"),
                ui_url=os.environ.get("WG_MLFLOW_UI", ""),
                enabled=os.environ.get("WG_MLFLOW") != "off" if mlflow is None else mlflow,
            ),
            "io_manager": JsonValues(root=str(root / "values")),
        },
        executor=dg.in_process_executor,
    )


def _broken_asset(file: BrokenFile) -> dg.AssetSpec:
    stem = re.sub(r"[^A-Za-z0-9_]", "_", Path(file.path).stem) or "file"
    return dg.AssetSpec(
        dg.AssetKey(["broken_worlds", stem]),
        group_name="broken_worlds",
        description=f"This file is not a world, so it has no steps.\n\n```\n{file.problem}\n```",
        metadata={"file": dg.MetadataValue.path(file.path), "problem": dg.MetadataValue.text(file.problem)},
    )

"""From world files to Dagster's definitions."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from resources.values import JsonValues
from resources.worlds import WorldPool
from wg_core.state.home import home
from wg_defs.checks import chain_check
from wg_defs.jobs import add_steps_job, evolve_job
from wg_defs.step import step_assets
from wg_defs.train import tracker_of
from wg_defs.training import train_job, training_assets
from wg_defs.worlds import BROKEN, BrokenFile, read_worlds


def build(
    folders: Sequence[Path] | None = None, *, root: Path | None = None, mlflow: bool | None = None
) -> dg.Definitions:
    """The definitions of all worlds in `folders`, with all data below `root` (`WG_HOME`).

    `mlflow` turns tracking off or on; by default it is on unless `WG_MLFLOW=off`.
    """
    # The version of an output has been in beta for years; one warning for each op would fill the log of every run.
    warnings.filterwarnings("ignore", message=".*`data_version`", category=dg.BetaWarning)
    warnings.filterwarnings("ignore", message=".*expected_writer_count", category=dg.PreviewWarning)  # inside Pipes
    worlds, broken = read_worlds(folders)
    root = (root or home()).absolute()
    assets: list[dg.AssetsDefinition | dg.AssetSpec] = _broken_assets(broken)
    checks: list[dg.AssetChecksDefinition] = []
    jobs: list[dg.JobDefinition] = []
    for file in worlds:
        steps = step_assets(file, root)
        assets.append(steps)
        checks.append(chain_check(file))
        jobs += [evolve_job(file, steps), add_steps_job(file)]
        if not file.on_base:
            training = training_assets(file, root)
            assets += training
            jobs.append(train_job(file, training))
    return dg.Definitions(
        assets=assets,
        asset_checks=checks,
        jobs=jobs,
        resources={
            "worlds": WorldPool(),
            "tracker": tracker_of(root, mlflow),
            "pipes": dg.PipesSubprocessClient(),
            "io_manager": JsonValues(root=str(root / "values")),
        },
        executor=dg.in_process_executor,
    )


def _broken_assets(files: Sequence[BrokenFile]) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """A place on the page for every file that is not a world, so that its problem is seen there too."""
    assets: dict[str, dg.AssetSpec] = {}
    for file in files:
        stem = re.sub(r"[^A-Za-z0-9_]", "_", Path(file.path).stem) or "file"
        name = next(n for n in (stem, *(f"{stem}_{i}" for i in range(2, len(files) + 2))) if n not in assets)
        assets[name] = dg.AssetSpec(
            dg.AssetKey([BROKEN, name]),
            group_name=BROKEN,
            description=f"This file is not a world, so it has no steps.\n\n```\n{file.problem}\n```",
            metadata={"file": dg.MetadataValue.path(file.path), "problem": dg.MetadataValue.text(file.problem)},
        )
    return list(assets.values())

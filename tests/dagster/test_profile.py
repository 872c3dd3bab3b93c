"""Profiles of a step through Dagster: asked for at launch, shown with each stage, written beside the run."""

import pstats
from pathlib import Path

import dagster as dg
import pytest
from stub_project import Project, materialized

from wg_defs.launch import checked


def test_a_launch_may_ask_where_the_time_goes(project: Project) -> None:
    """05 K-9, K-10, 04 X-24: one file and one table for each stage; the snapshot is that of a run without."""
    result = project.step("000000", seed=5, profile=True)
    assert result.success
    made = materialized(result)
    for role in ("philosopher", "author", "world_update", "development", "architect", "creator"):
        file = Path(str(made[role].metadata["profile_file"].value))
        assert file.parts[-5:] == ("profiles", "tide", "000000", result.run_id[:8], f"{role}.prof")
        assert file.is_relative_to(project.root / ".wg")
        assert any(name == "run_stage" for _, _, name in pstats.Stats(str(file)).stats)  # type: ignore[attr-defined]
        rows = [row.data for row in made[role].metadata["profile"].records]  # type: ignore[union-attr]
        outermost = next(row for row in rows if row["node"] == f"tide/{role}")
        assert sum(row["own_seconds"] for row in rows) == pytest.approx(outermost["seconds"], abs=0.001)
    plain = materialized(project.step("000000"))
    assert plain["snapshot"].metadata["published"].value == "before, with the same id: nothing changed"
    assert not any("profile" in name for m in plain.values() for name in m.metadata)


def test_the_profiler_may_be_that_of_torch() -> None:
    """04 X-24, 05 K-9."""
    assert [checked({"profile": given}).get("profile") for given in (False, True, {"kind": "cpu"}, {"kind": "torch"})] == [
        None, "cpu", "cpu", "torch",
    ]  # fmt: skip


def test_another_profiler_is_refused_before_the_run_starts(project: Project) -> None:
    """05 K-9."""
    job = project.job()
    for wrong in ("cpu", {"kind": "gpu"}, {}, 1):
        with pytest.raises(dg.DagsterInvalidConfigError):
            dg.validate_run_config(job, {"ops": {"tide__step": {"config": {"profile": wrong}}}})

"""The key of a world behind an API is in nothing that is kept, shown or tracked."""

from __future__ import annotations

import logging
from pathlib import Path

import dagster as dg
import pytest
import yaml
from api_server import KEY, ApiServer, status
from test_api_world import behind

from wg_blocks.templates import stub
from wg_core import World
from wg_defs.build import build


@pytest.mark.slow
def test_no_key_in_folders_snapshots_logs_dagster_or_mlflow(
    tmp_path: Path, server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """01 F-33, A-7, 04 X-1: a step through Dagster, tracked, whose server sends the key back; then every file is read."""
    for name in ("wg_blocks", "wg_core", "openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    config = stub("far")
    text = behind(server.url, cache=True, prices={"prompt": 1.0})
    config["execution"] |= {
        "models": {**config["execution"]["models"], "text": text},
        "storage": {"root": str(tmp_path / "store")},
    }
    (tmp_path / "worlds").mkdir()
    file = tmp_path / "worlds" / "far.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    server.replies.extend([status(500, f"bad key {KEY}"), status(400, f"bad key {KEY}")])
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        instance.add_dynamic_partitions("far__steps", ["000000"])
        job = build([file.parent], root=tmp_path / "home", mlflow=True).resolve_job_def("far__evolve")
        runs = [
            job.execute_in_process(instance=instance, partition_key="000000", raise_on_error=False,
                                   run_config={"ops": {"far__step": {"config": {"seed": 3}}}})
            for _ in range(2)
        ]  # fmt: skip
        assert [run.success for run in runs] == [False, True]
        told = "".join(str(event) for run in runs for event in run.all_events)
        assert "[key]" in told and KEY not in told
    World.from_yaml(file).save(tmp_path / "saved")
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"saved", "store", "dagster", "home"} <= {path.relative_to(tmp_path).parts[0] for path in kept}
    assert list((tmp_path / "home").rglob("mlflow.db"))
    assert not [path for path in kept if KEY.encode() in path.read_bytes()]
    assert KEY not in caplog.text and server.seen[0][1]["authorization"] == f"Bearer {KEY}"
    import mlflow

    mlflow.set_tracking_uri(None)

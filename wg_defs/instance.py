"""The Dagster instance of this project: where it lives, how it is set up, and what dead runs leave behind."""

import os
import socket
from pathlib import Path
from typing import Any

import dagster as dg

from wg_core.state.home import home
from wg_defs.partitions import add_steps

PROCESS_TAG = ".dagster/wg_process"
"""Hidden run tag `host:pid:birth` of a run's process; numbers of processes are used again, births not."""


def settings(root: str) -> dict[str, Any]:
    """What `dagster.yaml` says, with all storage below `root`."""
    return {
        "storage": {"sqlite": {"base_dir": f"{root}/storage"}},
        "local_artifact_storage": {
            "module": "dagster._core.storage.root",
            "class": "LocalArtifactStorage",
            "config": {"base_dir": f"{root}/artifacts"},
        },
        "compute_logs": {
            "module": "dagster._core.storage.local_compute_log_manager",
            "class": "LocalComputeLogManager",
            "config": {"base_dir": f"{root}/logs"},
        },
        "run_queue": {"dequeue_interval_seconds": 1},
        "concurrency": {
            "pools": {"granularity": "run", "default_limit": 1},
            "runs": {
                "tag_concurrency_limits": [
                    {"key": "dagster/backfill", "value": {"applyLimitPerUniqueValue": True}, "limit": 1}
                ]
            },
        },
        "run_monitoring": {"enabled": True, "start_timeout_seconds": 180, "max_runtime_seconds": 86400},
        "telemetry": {"enabled": False},
        "nux": {"enabled": False},
    }


def dagster_home() -> Path:
    """The folder whose `dagster.yaml` rules.

    `DAGSTER_HOME` if set; the working folder if it has the file and `WG_HOME` is unset; else `<WG_HOME>/dagster`,
    where the file is written.
    """
    if os.environ.get("DAGSTER_HOME"):
        return Path(os.environ["DAGSTER_HOME"]).expanduser().resolve()
    if not os.environ.get("WG_HOME") and Path("dagster.yaml").is_file():
        return Path.cwd()
    folder = (home() / "dagster").resolve()
    file = folder / "dagster.yaml"
    if not file.exists():
        import yaml

        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(settings(str(folder)), sort_keys=False), encoding="utf-8")
    return folder


def open_instance() -> dg.DagsterInstance:
    """The instance that the page of this project shows too."""
    return dg.DagsterInstance.from_config(str(dagster_home()))


def pool_name(world_id: str) -> str:
    """The concurrency pool that keeps the steps of a world apart."""
    return f"world_{world_id}"


def prepare(instance: dg.DagsterInstance, world_id: str, published: int) -> list[str]:
    """Limit the world to one step at a time, and have the key of its next step ready; returns the keys added.

    The limit is set here and not left to the default, which is not in force when a pool is first seen.
    """
    storage = instance.event_log_storage
    if storage.supports_global_concurrency_limits:
        limits = {pool.name: pool for pool in storage.get_pool_limits()}
        known = limits.get(pool_name(world_id))
        if known is None or known.from_default:
            storage.set_concurrency_slots(pool_name(world_id), 1)
    return add_steps(instance, world_id, published, 1)


def process_tag() -> str:
    """The value of `PROCESS_TAG` for this process."""
    return f"{socket.gethostname()}:{os.getpid()}:{_birth(os.getpid())}"


def reap(instance: dg.DagsterInstance) -> list[str]:
    """Close the runs whose process on this host is gone; returns their ids.

    A run that was killed stays STARTED in Dagster for good and would hold its world's pool.
    """
    closed: list[str] = []
    unfinished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    for run in instance.get_runs(filters=unfinished):
        host, pid, birth = [*run.tags.get(PROCESS_TAG, "").split(":"), "", ""][:3]
        if host != socket.gethostname() or not pid.isdigit() or _birth(int(pid)) == birth:
            continue
        instance.report_run_failed(run, message=f"Process {pid} of this run was killed; closed at the next start.")
        if instance.event_log_storage.supports_global_concurrency_limits:
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        closed.append(run.run_id)
    return closed


def _birth(pid: int) -> str:
    """When process `pid` started, in ms since 1970; empty if it is gone. Numbers of processes are used again."""
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(int(process.create_time() * 1000))
    except psutil.NoSuchProcess:
        return ""

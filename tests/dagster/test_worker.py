"""Many steps in one process, dead runs, and steps that are ready to launch."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster import DagsterRunStatus
from stub_project import QUIET, Model, Project, developed_by, failing_creator, stub_config, write_world

from wg_core.errors import ConfigError
from wg_defs.instance import PROCESS_TAG, pool_name, prepare, process_tag, reap, settings
from wg_defs.worker import Evolved, evolve


@pytest.fixture
def lasting(tmp_path: Path) -> Iterator[Project]:
    """A project on an instance that is kept in files, as the page has it."""
    folder = tmp_path / "dagster"
    folder.mkdir()
    (folder / "dagster.yaml").write_text(yaml.safe_dump(settings(str(folder))), encoding="utf-8")
    write_world(tmp_path / "worlds", stub_config("tide", tmp_path / "snapshots"))
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        yield Project(tmp_path, instance)


def run_worker(project: Project, steps: int, **more: object) -> list[Evolved]:
    return evolve(
        "tide", steps, folders=[project.worlds], root=project.root, instance=project.instance, mlflow=False, **more
    )


def test_every_step_is_a_run(lasting: Project) -> None:  # proves 05 K-7
    seen: list[Evolved] = []
    done = run_worker(lasting, 1, until=1, action="a storm lands", seed=2, on_step=seen.append)
    assert done == seen and [e.partition for e in done] == ["000000", "000001"]
    history = lasting.world().store.history("tide")
    assert [s.id for s in history] == [e.snapshot for e in done]
    assert [s.action for s in history] == ["a storm lands", None]
    runs = {run.run_id: run for run in lasting.instance.get_runs()}
    assert {e.run_id for e in done} == set(runs)
    for e in done:
        run = runs[e.run_id]
        assert run.status == DagsterRunStatus.SUCCESS and run.job_name == "tide__evolve"
        assert run.tags["dagster/partition"] == e.partition and run.tags["dagster/max_runtime"]
    assert lasting.instance.get_dynamic_partitions("tide__steps") == [f"{i:06d}" for i in range(3)]
    assert run_worker(lasting, 1, until=1) == []


def test_worker_stops_at_a_failure_and_says_why(lasting: Project) -> None:
    write_world(lasting.worlds, failing_creator(stub_config("tide", lasting.root / "snapshots")))
    (only,) = run_worker(lasting, 2)
    assert not only.ok and "the brush broke" in only.error and only.step == 0
    assert lasting.instance.get_run_by_id(only.run_id).status == DagsterRunStatus.FAILURE
    config = stub_config("tide", lasting.root / "snapshots")
    config["execution"]["stages"]["author"]["graph"]["nodes"][0]["block_type"] = "no/such_block"
    write_world(lasting.worlds, config)
    with pytest.raises(ConfigError, match="no/such_block"):
        run_worker(lasting, 2)
    with pytest.raises(ConfigError, match="steps: 0"):
        run_worker(lasting, 0)
    with pytest.raises(ConfigError, match=r"no world 'tidy'.*tide"):
        evolve("tidy", 1, folders=[lasting.worlds], instance=lasting.instance)


def test_models_stay_loaded(lasting: Project) -> None:  # proves 05 K-7
    block = {"block_type": "trial/model", "config": {"model_id": f"made for {lasting.root}"}}
    write_world(lasting.worlds, developed_by(stub_config("tide", lasting.root / "snapshots"), block))
    before = Model.built
    assert all(e.ok for e in run_worker(lasting, 2))
    assert Model.built == before + 1


def test_a_killed_worker_leaves_nothing_in_the_way(lasting: Project) -> None:  # proves 05 K-13
    hold = lasting.root / "hold"
    hold.touch()
    block = {"block_type": "trial/waits", "config": {"path": str(hold)}}
    write_world(lasting.worlds, developed_by(stub_config("tide", lasting.root / "snapshots"), block))
    code = (
        "import sys, dagster as dg, stub_project; from pathlib import Path; from wg_defs.worker import evolve;"
        "instance = dg.DagsterInstance.from_config(sys.argv[2]); root = Path(sys.argv[1]);"
        "evolve('tide', 1, folders=[root / 'worlds'], root=root, mlflow=False, instance=instance)"
    )
    command = [sys.executable, "-c", code, str(lasting.root), str(lasting.root / "dagster")]
    worker = subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not hold.with_suffix(".seen").exists():
            assert worker.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        worker.kill()
        worker.wait()
    hold.unlink()
    (killed,) = lasting.instance.get_runs()
    assert killed.status == DagsterRunStatus.STARTED
    (done,) = run_worker(lasting, 1)
    assert done.ok and done.step == 0
    assert lasting.instance.get_run_by_id(killed.run_id).status == DagsterRunStatus.FAILURE
    assert lasting.world().store.verify("tide") == []


def test_the_pool_of_a_world_holds_one(lasting: Project) -> None:  # proves 05 K-4
    storage = lasting.instance.event_log_storage
    assert storage.get_pool_limits() == []
    prepare(lasting.instance, "tide", -1)
    limits = {pool.name: (pool.limit, pool.from_default) for pool in storage.get_pool_limits()}
    assert limits == {pool_name("tide"): (1, False)}
    storage.set_concurrency_slots(pool_name("tide"), 0)  # a person closed the world
    prepare(lasting.instance, "tide", -1)
    assert storage.get_pool_limits()[0].limit == 0
    ops = lasting.job().nodes
    pools = {d.pool for d in lasting.job().graph.iterate_op_defs()}
    assert ops and pools == {pool_name("tide")}


def test_more_steps_are_made_ready(lasting: Project) -> None:
    job = lasting.definitions().resolve_job_def("tide__add_steps")

    def add(count: int) -> bool:
        config = {"ops": {"tide__add_keys": {"config": {"count": count}}}, "loggers": QUIET}
        return job.execute_in_process(instance=lasting.instance, run_config=config, raise_on_error=False).success

    assert add(5) and add(3)
    assert lasting.instance.get_dynamic_partitions("tide__steps") == [f"{i:06d}" for i in range(5)]
    lasting.world().step()
    assert add(5)
    assert lasting.instance.get_dynamic_partitions("tide__steps") == [f"{i:06d}" for i in range(6)]
    assert not add(0)


def test_runs_of_dead_processes_are_closed(lasting: Project) -> None:  # proves 05 K-13
    gone = subprocess.run(
        [sys.executable, "-c", "from wg_defs.instance import process_tag; print(process_tag())"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    host, pid, birth = process_tag().split(":")
    tags = {
        "gone": gone,
        "reused": f"{host}:{pid}:{int(birth) - 1}",
        "alive": process_tag(),
        "elsewhere": f"another-host:{pid}:1",
        "unknown": "",
    }
    job = lasting.job()
    ids = {}
    for name, tag in tags.items():
        run = lasting.instance.create_run_for_job(job, status=DagsterRunStatus.STARTED, tags={PROCESS_TAG: tag})
        ids[run.run_id] = name
    closed = reap(lasting.instance)
    assert sorted(ids[run_id] for run_id in closed) == ["gone", "reused"]
    states = {ids[r.run_id]: r.status for r in lasting.instance.get_runs()}
    assert states["gone"] == states["reused"] == DagsterRunStatus.FAILURE
    assert {states[n] for n in ("alive", "elsewhere", "unknown")} == {DagsterRunStatus.STARTED}
    assert reap(lasting.instance) == [] and os.getpid() == int(pid)

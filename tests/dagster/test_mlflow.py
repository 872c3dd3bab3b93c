"""Steps and model calls in MLflow, on its sqlite backend."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from stub_project import Project, failing_creator, failure, materialized, stub_config, write_world

from resources.mlflow_tracker import LONGEST_TEXT, MlflowTracker, shown


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose steps are tracked (one for all tests: a new MLflow database takes seconds)."""
    root = tmp_path_factory.mktemp("tracked")
    write_world(root / "worlds", stub_config("tide", root / "snapshots"))
    with dg.DagsterInstance.ephemeral() as instance:
        yield Project(root, instance, mlflow=True)
    import mlflow

    mlflow.set_tracking_uri(None)


def test_a_step_is_a_run_and_its_calls_are_spans(tracked: Project) -> None:  # proves 05 K-15, K-10
    first = tracked.step("000000", action="a storm lands")
    second = tracked.step("000001")
    from mlflow import MlflowClient

    database = tracked.root / ".wg" / "mlflow" / "mlflow.db"
    assert database.is_file()
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("world/tide")
    assert experiment is not None
    assert Path(experiment.artifact_location.removeprefix("file://")).is_relative_to(database.parent)
    runs = {run.data.tags["wg/step"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"0", "1"}
    for result, run in ((first, runs["0"]), (second, runs["1"])):
        made = materialized(result)
        assert run.info.status == "FINISHED"
        assert run.data.tags["dagster/run_id"] == result.run_id
        assert run.data.tags["wg/snapshot"] == made["snapshot"].tags["dagster/data_version"]
        assert made["snapshot"].metadata["mlflow_run_id"].value == run.info.run_id
        assert made["snapshot"].metadata["mlflow_file"].value == str(database)
        assert run.data.metrics["tokens"] == made["snapshot"].metadata["tokens"].value > 0
        traces = client.search_traces(
            locations=[experiment.experiment_id], filter_string=f"run_id = '{run.info.run_id}'"
        )
        by_stage = {t.info.tags["mlflow.traceName"]: t for t in traces}
        called = [role for role, m in made.items() if "mlflow_trace_id" in m.metadata]
        assert sorted(by_stage) == sorted(called) and "development" in called
        for role in called:
            trace = by_stage[role]
            assert trace.info.trace_id == made[role].metadata["mlflow_trace_id"].value
            assert trace.info.tags["dagster/run_id"] == result.run_id
            root, *calls = sorted(trace.data.spans, key=lambda span: span.parent_id is not None)
            assert root.name == role and calls
            for call in calls:
                assert call.parent_id == root.span_id and call.span_type == "CHAT_MODEL"
                assert call.inputs and call.outputs and f"/{role}/" in call.name
            assert trace.info.token_usage["total_tokens"] == made[role].metadata["tokens"].value
    assert runs["0"].data.params["action"] == "a storm lands"


def test_a_failed_step_is_a_failed_run(tracked: Project) -> None:
    write_world(tracked.worlds, failing_creator(stub_config("tide", tracked.root / "snapshots")))
    key = f"{len(tracked.world().store.steps('tide')):06d}"
    assert failure(tracked.step(key))[0] == "creator"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tracked.root}/.wg/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("world/tide")
    run = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]
    assert run.info.status == "FAILED" and run.data.tags["wg/failed_stage"] == "creator"


def test_a_tracker_that_fails_is_shown_and_stops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    tracker = MlflowTracker(tracking_uri=f"sqlite:///{file}/mlflow.db", artifacts=str(tmp_path))
    tracking = tracker.start("tide", 0, "run", {})
    assert "error" in tracking and "mlflow_error" in tracker.metadata(tracking)
    with tracker.stage(tracking, "author", {}) as calls:
        pass
    assert calls.trace_id == ""
    assert tracker.finish(tracking, "FINISHED", {}, 0, {}) == tracking["error"]


def test_what_a_span_keeps() -> None:
    request = {"messages": ["x" * (LONGEST_TEXT + 5)], "headers": {"Authorization": "Bearer sk-1", "X-Api-Key": "k"}}
    kept = shown({**request, "live": object(), "api_key": "sk-2"})
    assert "sk-" not in str(kept) and "Bearer" not in str(kept)
    assert kept["messages"][0].endswith("(5 more characters)") and kept["live"] == "(object)"

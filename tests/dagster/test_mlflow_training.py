"""A training in MLflow: one run that goes on after a stop, and a version of its adapter."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from resources.mlflow_tracker import MlflowTracker
from resources.mlflow_training import RUN_FILE, MlflowTraining, flat
from wg_core.execution.context import Event


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowTracker]:
    """A tracker on a database of its own (one for all tests: making it takes seconds)."""
    root = tmp_path_factory.mktemp("training")
    yield MlflowTracker(tracking_uri=f"sqlite:///{root}/mlflow.db", artifacts=str(root / "artifacts"))
    import mlflow

    mlflow.set_tracking_uri(None)


def event(kind: str, **data: float) -> Event:
    return Event(kind, "tide_lora", "training", data=data)


def test_a_training_is_one_run_that_goes_on(tracker: MlflowTracker, tmp_path: Path) -> None:
    """03 L-6, 05 K-15: parameters, metrics by step, samples, the same run after a stop, linked to the Dagster run."""
    first = MlflowTraining(tracker, "tide", "tide_lora", tmp_path)
    tracking = first.start({"lr": 0.001, "lora": {"rank": 4, "targets": ["*"]}}, {"dagster/run_id": "run-1"})
    first(event("train_step", step=1, of=3, loss=2.0, lr=0.001, tokens_per_s=50.0))
    first(event("train_eval", step=1, of=3, held_out_loss=2.5))
    first.text("The pier.", "samples/before.md")
    assert first.finish("KILLED") == ""
    assert json.loads((tmp_path / RUN_FILE).read_text())["run_id"] == tracking["run_id"]

    second = MlflowTraining(tracker, "tide", "tide_lora", tmp_path)
    assert second.start({"lr": 0.001}, {"dagster/run_id": "run-2"}) == tracking and second.resumed
    second(event("train_step", step=2, of=3, loss=1.5, lr=0.001))
    second.finish("FINISHED", {"wg/steps": "0..9"})

    client = tracker.client()
    run = client.get_run(tracking["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.001", "lora.rank": "4", "lora.targets": '["*"]'}
    expected = {"wg/kind": "training", "wg/world": "tide", "wg/lora": "tide_lora", "wg/steps": "0..9", "dagster/run_id": "run-2"}
    assert expected.items() <= run.data.tags.items()
    assert [(m.step, m.value) for m in client.get_metric_history(tracking["run_id"], "loss")] == [(1, 2.0), (2, 1.5)]
    assert run.data.metrics["held_out_loss"] == 2.5 and run.data.metrics["tokens_per_s"] == 50.0
    assert [a.path for a in client.list_artifacts(tracking["run_id"], "samples")] == ["samples/before.md"]


def test_a_run_that_was_stopped_before_it_had_parameters_gets_them(tracker: MlflowTracker, tmp_path: Path) -> None:
    """03 L-6: a kill right after the run was made leaves no second run, and none without parameters."""
    experiment = tracker.experiment("tide")
    run_id = tracker.client().create_run(experiment).info.run_id
    (tmp_path / RUN_FILE).write_text(json.dumps({"run_id": run_id, "experiment_id": experiment}))
    training = MlflowTraining(tracker, "tide", "cut_lora", tmp_path)
    assert training.start({"lr": 0.001}, {})["run_id"] == run_id and training.finish("FINISHED") == ""
    assert tracker.client().get_run(run_id).data.params == {"lr": "0.001"}


def test_an_adapter_becomes_a_version_and_the_champion(tracker: MlflowTracker, tmp_path: Path) -> None:
    """03 L-6: a registered version with alias and signature, made from the run's artifacts; no pickle among them."""
    adapter = tmp_path / "adapter"
    (adapter / "text").mkdir(parents=True)
    (adapter / "text" / "adapter_config.json").write_text("{}")
    training = MlflowTraining(tracker, "tide", "isle_lora", tmp_path)
    training.start({}, {})
    first = training.register(adapter, tags={"base": "abc"})
    assert first == {"model": "isle_lora", "version": "1"}
    assert training.register(adapter, tags={}) == {"model": "isle_lora", "version": "2"}
    training.crown(first)
    training.finish("FINISHED")
    assert training.error == ""
    client = tracker.client()
    champion = client.get_model_version_by_alias("isle_lora", "champion")
    assert champion.version == 1 and champion.run_id == training.run_id and champion.tags == {"base": "abc"}
    from mlflow.models import get_model_info

    signature = get_model_info("models:/isle_lora@champion").signature
    assert signature.inputs.input_names() == ["messages"] and signature.outputs.input_names() == ["answer"]
    files = [a.path for a in client.list_artifacts(training.run_id, "adapter")]
    assert sorted(files) == ["adapter/MLmodel", "adapter/text"]


def test_a_tracker_that_fails_stops_no_training(tmp_path: Path) -> None:
    """03 L-6: tracking is optional; what fails is told once."""
    (tmp_path / "file").write_text("not a folder")
    broken = MlflowTracker(tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db", artifacts=str(tmp_path))
    training = MlflowTraining(broken, "tide", "tide_lora", tmp_path)
    assert "error" in training.start({"lr": 1}, {})
    training(event("train_step", step=1, loss=1.0))
    training.text("a", "b.md")
    assert training.register(tmp_path, tags={}) == {} and training.run_id == ""
    assert training.finish("FINISHED") == training.error != ""
    off = MlflowTraining(MlflowTracker(tracking_uri="", artifacts="", enabled=False), "tide", "tide_lora", tmp_path)
    assert off.start({}, {}) == {} and off.finish("FINISHED") == ""


def test_settings_are_flat() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}) == {"a.b": 1, "a.c.d": "[1, 2]", "e": None}

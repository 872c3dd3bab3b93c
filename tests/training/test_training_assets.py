"""The training of a LoRA world as Dagster assets: checks that stop it, a process of its own, and both links."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from tiny_project import Tiny

from wg_core import World
from wg_defs.build import build
from wg_defs.train import training_folder

LOGS = {"console": {"config": {"log_level": "CRITICAL"}}}
QUICK = {"steps": 4, "lr": 0.02, "rank": 4, "samples": 1}


def run(
    tiny: Tiny, instance: dg.DagsterInstance, selection: list[str], **config: dict[str, Any]
) -> dg.ExecuteInProcessResult:
    """The chosen assets of the job `tide__train`, all if none is named; config by the last part of the asset's key."""
    ops = {"training_examples": "tide__training_examples", "evaluation": "tide__lora__evaluation"}
    return (
        build([tiny.file], root=tiny.home, mlflow=True)
        .resolve_job_def("tide__train")
        .execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(["tide", *name.split("/")]) for name in selection] or None,
            run_config={"ops": {ops[name]: {"config": value} for name, value in config.items()}, "loggers": LOGS},
            raise_on_error=False,
        )
    )


def made(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    found = (e for e in result.all_events if e.is_step_materialization)
    return {
        e.asset_key.to_user_string(): {
            k: v.value for k, v in e.step_materialization_data.materialization.metadata.items()
        }
        for e in found
    }


def failures(result: dg.ExecuteInProcessResult) -> list[str]:
    """What failed, in words, for the message of a test."""
    return [
        str(e.step_failure_data.user_failure_data or e.step_failure_data.error)
        for e in result.all_events
        if e.is_step_failure
    ]


def failed_checks(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    return {c.check_name: c.metadata for c in result.get_asset_check_evaluations() if not c.passed}


@pytest.mark.slow
def test_examples_adapter_evaluation_and_world(at_home: Tiny) -> None:
    """05 mapping, K-10, K-14, K-15, 03 L-6, L-7: the chain of assets, its checks, and the links between both pages."""
    target = at_home.root / "worlds" / "shown.yaml"
    with dg.DagsterInstance.ephemeral() as instance:
        strict = {"steps": 0, "asked": 0, "loss_ratio": 0.01}
        result = run(at_home, instance, [], training_examples={**QUICK, "name": "shown"}, evaluation=strict)
        found = made(result)
        assert list(found) == ["tide/training_examples", "tide/lora/adapter", "tide/lora/evaluation"], failures(result)
        assert list(failed_checks(result)) == ["beside_its_base"] and not target.exists()
        assert len(result.get_asset_check_evaluations()) == 12
        trained = found["tide/lora/adapter"]
        assert trained["held_out_loss"] < trained["base_held_out_loss"] and "before:" in trained["samples"]

        later = run(at_home, instance, ["lora/evaluation", "lora/world"], evaluation={"steps": 1, "asked": 0})
        assert later.success and failed_checks(later) == {}
        shown = made(later)
        assert "# shown beside tide" in shown["tide/lora/evaluation"]["comparison"]
        assert Path(shown["tide/lora/evaluation"]["side_by_side"]).is_file()
        assert World.from_yaml(target).world_id == "shown"
        from mlflow import MlflowClient

        run_id = trained["mlflow_run_id"]
        assert run_id == shown["tide/lora/evaluation"]["mlflow_run_id"] == shown["tide/lora/world"]["mlflow_run_id"]
        tracked = MlflowClient(f"sqlite:///{at_home.home}/mlflow/mlflow.db").get_run(run_id)
        assert tracked.data.tags["dagster/run_id"] == result.run_id and tracked.info.status == "FINISHED"
        assert (
            tracked.data.tags["dagster/evaluation_run_id"] == later.run_id and tracked.data.tags["wg/passed"] == "true"
        )

        again = run(at_home, instance, ["training_examples"], training_examples={**QUICK, "name": "shown"})
        failed = next(e for e in again.all_events if e.is_step_failure)
        assert "restart" in failed.step_failure_data.user_failure_data.description
    target.unlink()


def test_a_failing_check_stops_the_training(at_home: Tiny) -> None:
    """03 L-5: a table that was edited into leaking is shown, with its rows, and nothing is trained on it."""
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(at_home, instance, ["training_examples"], training_examples={**QUICK, "name": "leaky"}).success
        table = training_folder("tide", "leaky", at_home.home) / "examples.jsonl"
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        held = next(row for row in rows if row["split"] == "held_out")
        table.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**held, "split": "train", "step": 99}]))
        second = run(at_home, instance, [], training_examples={**QUICK, "name": "leaky", "resume": True})
        assert list(made(second)) == ["tide/training_examples"]
        broken = failed_checks(second)
        assert set(broken) == {"duplicates", "leaking_texts"}
        assert f"row {len(rows)} " in str(broken["leaking_texts"]["rows"].value)


def test_what_stops_the_process_is_the_reason(at_home: Tiny) -> None:
    """03 L-6: what the training process says is what the failed step says."""
    taken = at_home.root / "worlds" / "taken.yaml"
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(at_home, instance, ["training_examples"], training_examples={**QUICK, "name": "taken"}).success
        taken.write_text("{}")
        try:
            result = run(at_home, instance, ["lora/adapter"])
        finally:
            taken.unlink()
        assert "taken.yaml exists already; choose another --name" in failures(result)[0]


def test_a_world_without_a_model_says_so(at_home: Tiny, tmp_path: Path) -> None:
    stub = World.from_template("stub", world_id="mute")
    file = stub.save_config(tmp_path / "mute.yaml")
    job = build([file], root=tmp_path / ".wg", mlflow=False).resolve_job_def("mute__train")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, run_config={"loggers": LOGS}, raise_on_error=False)
        failed = next(e for e in result.all_events if e.is_step_failure)
        assert "has no model that can learn" in failed.step_failure_data.user_failure_data.description

"""A training in MLflow: one run in the world's experiment, which goes on after a kill, and a version of its adapter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resources.mlflow_tracker import MlflowTracker
from wg_core.state.files import write_file

RUN_FILE = "mlflow_run.json"
CHAMPION = "champion"
"""The alias of the version that the LoRA world's file uses; `latest` is MLflow's own."""

METRICS = {"train_step": ("loss", "lr", "tokens_per_s", "grad_norm"), "train_eval": ("held_out_loss",)}


class MlflowTraining:
    """Records one training; never raises: `error` tells what was not recorded.

    It is a hook of `fit`. `folder` keeps the id of the run beside the state of the training, so that a training that
    goes on is the same run.
    """

    def __init__(self, tracker: MlflowTracker, world_id: str, lora_id: str, folder: Path) -> None:
        self.tracker, self.world_id, self.lora_id, self.folder = tracker, world_id, lora_id, folder
        self.tracking: dict[str, str] = {}
        self.resumed = False
        self.error = ""
        self._monitor: Any = None

    @property
    def run_id(self) -> str:
        """The id of the MLflow run, empty where nothing is tracked."""
        return self.tracking.get("run_id", "")

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> dict[str, str]:
        """Open the run, or go on with that of `folder`: `{run_id, experiment_id, url}` or `{error}` or `{}`."""
        if not self.tracker.enabled:
            return {}
        with self.tracker.guard() as failed:
            client = self.tracker.client()
            experiment = self.tracker.experiment(self.world_id)
            run_id = self._known(experiment)
            self.resumed = run_id is not None
            if run_id is None:
                run_id = client.create_run(experiment, run_name=f"{self.lora_id} training").info.run_id
                write_file(self.folder / RUN_FILE, json.dumps({"run_id": run_id, "experiment_id": experiment}).encode())
            else:
                client.update_run(run_id, status="RUNNING")
            if not client.get_run(run_id).data.params:  # a new run, or one that was stopped before it had them
                self._log_params(run_id, params)
            own = {"wg/kind": "training", "wg/world": self.world_id, "wg/lora": self.lora_id}
            self.tracking = {"run_id": run_id, "experiment_id": experiment, "url": self.tracker.url(experiment, run_id)}
            self.tag({**own, **tags})
            self._watch_system(run_id)
        self._note(failed)
        return self.tracking or failed

    def __call__(self, event: Any) -> None:
        """Keep the numbers of an event of the training, at its step."""
        names = METRICS.get(event.kind)
        if self.run_id and names:
            numbers = {name: event.data[name] for name in names if event.data.get(name) is not None}
            self.metrics(numbers, int(event.data["step"]))

    def metrics(self, numbers: Mapping[str, float], step: int) -> None:
        """Keep numbers of one step."""
        self._record(lambda client: client.log_batch(self.run_id, metrics=_as_metrics(numbers, step)))

    def rejoin(self) -> bool:
        """Take up the run that `folder` names, without opening it again; whether there is one."""
        if not self.tracker.enabled:
            return False
        with self.tracker.guard() as failed:
            experiment = self.tracker.experiment(self.world_id)
            run_id = self._known(experiment)
            if run_id is not None:
                url = self.tracker.url(experiment, run_id)
                self.tracking = {"run_id": run_id, "experiment_id": experiment, "url": url}
        self._note(failed)
        return bool(self.tracking)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""

        def work(client: Any) -> None:
            for name, value in tags.items():
                client.set_tag(self.run_id, name, value)

        self._record(work)

    def file(self, file: Path, name: str) -> None:
        """Keep a file in the artifact folder `name`."""
        self._record(lambda client: client.log_artifact(self.run_id, str(file), name))

    def text(self, text: str, name: str) -> None:
        """Keep a text as the artifact `name`."""
        self._record(lambda client: client.log_text(self.run_id, text, name))

    def register(self, adapter: Path, *, tags: Mapping[str, str]) -> dict[str, str]:
        """Keep the adapter (PEFT layout) and make a version of it.

        Gives `{model, version}`, or nothing where it was not recorded. No flavour is written: what loads it is PEFT.
        """
        made: dict[str, str] = {}

        def work(client: Any) -> None:
            client.log_artifacts(self.run_id, str(adapter), "adapter")
            client.log_text(self.run_id, _mlmodel(self.run_id), "adapter/MLmodel")
            _ensure_model(client, self.lora_id, self.world_id)
            source = f"{client.get_run(self.run_id).info.artifact_uri}/adapter"
            version = client.create_model_version(self.lora_id, source, run_id=self.run_id, tags=dict(tags)).version
            client.set_tag(self.run_id, "wg/model_version", str(version))
            made.update(model=self.lora_id, version=str(version))

        self._record(work)
        return made

    def crown(self, made: Mapping[str, str]) -> None:
        """Make a version that `register` gave the champion."""
        if not (made and self.tracker.enabled):
            return
        with self.tracker.guard() as failed:
            self.tracker.client().set_registered_model_alias(made["model"], CHAMPION, made["version"])
        self._note(failed)

    def finish(self, status: str, tags: Mapping[str, str] | None = None) -> str:
        """Close the run as FINISHED, FAILED or KILLED; gives the first error, or an empty text."""
        if self._monitor is not None:
            with self.tracker.guard() as failed:
                self._monitor.finish()
            self._monitor = None
            self._note(failed)

        self.tag(tags or {})
        self._record(lambda client: client.set_terminated(self.run_id, status=status))
        return self.error

    def _record(self, work: Any) -> None:
        if not self.run_id:
            return
        with self.tracker.guard() as failed:
            work(self.tracker.client())
        self._note(failed)

    def _note(self, failed: Mapping[str, str]) -> None:
        self.error = self.error or failed.get("error", "")

    def _known(self, experiment: str) -> str | None:
        """The run that `folder` names, if it is there and of this experiment."""
        from mlflow.exceptions import MlflowException

        file = self.folder / RUN_FILE
        if not file.is_file():
            return None
        known = json.loads(file.read_bytes())
        try:
            run = self.tracker.client().get_run(known["run_id"])
        except MlflowException:
            return None
        return str(known["run_id"]) if run.info.experiment_id == experiment else None

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(name, str(value)[:6000]) for name, value in flat(params).items() if value is not None]
        for start in range(0, len(rows), 100):
            self.tracker.client().log_batch(run_id, params=rows[start : start + 100])

    def _watch_system(self, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(
            run_id, sampling_interval=5, samples_before_logging=2, resume_logging=self.resumed
        )
        self._monitor.start()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted names; lists as JSON."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = (
                json.dumps(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            )
    return found


def _as_metrics(numbers: Mapping[str, float], step: int) -> list[Any]:
    import time

    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in numbers.items()]


def _ensure_model(client: Any, name: str, world_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(
            name, tags={"wg/world": world_id}, description=f"Adapters of {name} on {world_id}"
        )


def _mlmodel(run_id: str) -> str:
    """The description of a model without flavours: chat messages in, the answer out."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Object, Property

    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    signature = ModelSignature(
        inputs=Schema([ColSpec(Array(message), "messages")]), outputs=Schema([ColSpec(DataType.string, "answer")])
    )
    return str(Model(artifact_path="adapter", run_id=run_id, signature=signature).to_yaml())

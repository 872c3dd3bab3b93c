"""MLflow: one experiment per world, one run per step, model calls as spans below the stage that made them."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import PrivateAttr

if TYPE_CHECKING:
    from mlflow import MlflowClient

LONGEST_TEXT = 20_000
"""Characters of one text kept in a span; the rest is cut with a note."""


class MlflowTracker(dg.ConfigurableResource):
    """Records steps and model calls; never raises: what fails is a warning in the run's log and in `error`."""

    tracking_uri: str
    artifacts: str
    ui_url: str = ""
    enabled: bool = True

    _client: Any = PrivateAttr(default=None)
    _experiments: dict[str, str] = PrivateAttr(default_factory=dict)

    def start(self, world_id: str, step: int, dagster_run_id: str, params: Mapping[str, Any]) -> dict[str, str]:
        """Open the MLflow run of a step; the result is JSON: `{run_id, experiment_id, url}` or `{error}` or `{}`."""
        if not self.enabled:
            return {}
        with self.guard() as failed:
            client = self.client()
            experiment = self.experiment(world_id)
            tags = {"dagster/run_id": dagster_run_id, "wg/world": world_id, "wg/step": str(step)}
            run = client.create_run(experiment, run_name=f"{world_id} {step:06d}", tags=tags)
            for name, value in params.items():
                if value is not None:
                    client.log_param(run.info.run_id, name, str(value)[:500])
            run_id = run.info.run_id
            return {"run_id": run_id, "experiment_id": experiment, "url": self.url(experiment, run_id)}
        return failed

    @contextmanager
    def stage(self, tracking: Mapping[str, str], name: str, tags: Mapping[str, str]) -> Iterator["StageCalls"]:
        """Collect the model calls of one stage; on leaving they become one trace, also when the stage failed."""
        calls = StageCalls()
        started = time.time_ns()
        status = "ERROR"
        try:
            yield calls
            status = "OK"
        finally:
            if tracking.get("run_id") and calls.calls:
                with self.guard() as failed:
                    calls.trace_id = self._trace(tracking, name, dict(tags), calls, started, status)
                calls.error = failed.get("error", "")

    def finish(
        self, tracking: Mapping[str, str], status: str, metrics: Mapping[str, float], step: int, tags: Mapping[str, str]
    ) -> str:
        """Close a step's run as FINISHED or FAILED; returns the error, or an empty text."""
        if not tracking.get("run_id"):
            return tracking.get("error", "")
        with self.guard() as failed:
            client = self.client()
            for name, value in metrics.items():
                client.log_metric(tracking["run_id"], name, value, step=step)
            for name, value in tags.items():
                client.set_tag(tracking["run_id"], name, value)
            client.set_terminated(tracking["run_id"], status=status)
        return failed.get("error", "")

    def metadata(self, tracking: Mapping[str, str]) -> dict[str, dg.MetadataValue]:
        """What the page shows: run id, and a link, or where no server is known the file and the command for it."""
        if tracking.get("error"):
            return {"mlflow_error": dg.MetadataValue.text(tracking["error"])}
        if not tracking.get("run_id"):
            return {}
        shown = {"mlflow_run_id": dg.MetadataValue.text(tracking["run_id"])}
        if tracking["url"].startswith("http"):
            shown["mlflow_url"] = dg.MetadataValue.url(tracking["url"])
        else:
            shown["mlflow_file"] = dg.MetadataValue.path(tracking["url"])
            shown["mlflow_open"] = dg.MetadataValue.text(f"mlflow ui --backend-store-uri {self.tracking_uri}")
        return shown

    def client(self) -> "MlflowClient":
        """The client of the tracking store, made at its first use."""
        if self._client is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
            os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")  # else each flush waits a second
            import mlflow
            from mlflow import MlflowClient

            mlflow.set_tracking_uri(self.tracking_uri)  # traces go to the global address, runs to the client's
            with self._alone():
                self._client = MlflowClient(self.tracking_uri)
        return self._client

    def experiment(self, world_id: str) -> str:
        """The id of the world's experiment, which is made where it is missing."""
        if world_id not in self._experiments:
            client = self.client()
            name = f"world/{world_id}"
            with self._alone():
                found = client.get_experiment_by_name(name)
                if found is None:
                    remote = self.tracking_uri.startswith("http")
                    place = None if remote else Path(self.artifacts, world_id).resolve().as_uri()
                    self._experiments[world_id] = client.create_experiment(name, artifact_location=place)
                else:
                    self._experiments[world_id] = found.experiment_id
        return self._experiments[world_id]

    def _alone(self) -> AbstractContextManager[object]:
        """One process at a time makes a local database or an experiment in it."""
        from filelock import FileLock

        if not self.tracking_uri.startswith("sqlite:///"):
            return nullcontext()
        database = Path(self.tracking_uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{database}.lock", timeout=120)

    def url(self, experiment: str, run_id: str) -> str:
        """Where a person sees a run: a page, or the file of a local store."""
        base = self.ui_url or (self.tracking_uri if self.tracking_uri.startswith("http") else "")
        if base:
            return f"{base.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        return self.tracking_uri.removeprefix("sqlite:///")

    def _trace(
        self,
        tracking: Mapping[str, str],
        name: str,
        tags: dict[str, str],
        calls: "StageCalls",
        started: int,
        status: str,
    ) -> str:
        client = self.client()
        root = client.start_trace(
            name,
            span_type="CHAIN",
            experiment_id=tracking["experiment_id"],
            run_id=tracking["run_id"],
            tags=tags,
            inputs={"calls": len(calls.calls)},
            start_time_ns=started,
        )
        for call in calls.calls:
            span = client.start_span(
                call["path"] or "model_call",
                trace_id=root.trace_id,
                parent_id=root.span_id,
                span_type="CHAT_MODEL",
                inputs=call["request"],
                attributes={"model": call["model"]},
                start_time_ns=call["start"],
            )
            used = {"input_tokens": call["prompt_tokens"], "output_tokens": call["completion_tokens"]}
            used["total_tokens"] = sum(used.values())
            client.end_span(
                root.trace_id,
                span.span_id,
                outputs=call["answer"],
                attributes={"mlflow.chat.tokenUsage": used},
                end_time_ns=call["end"],
            )
        client.end_trace(root.trace_id, status=status)
        return root.trace_id

    @contextmanager
    def guard(self) -> Iterator[dict[str, str]]:
        """What fails inside is a warning, and `error` in the mapping; it stops nothing."""
        failed: dict[str, str] = {}
        try:
            yield failed
        except Exception as error:  # tracking must not stop a world; the failure is shown, not hidden
            failed["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            dg.get_dagster_logger().warning("MLflow did not record this: %s", failed["error"])


class StageCalls:
    """An engine hook that keeps a stage's model calls and the seconds of its nodes."""

    kinds = ("model_call", "node_end")

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.nodes: list[tuple[str, float]] = []
        self.trace_id = ""
        self.error = ""

    def __call__(self, event: Any) -> None:
        """Keep a model call, or the seconds of a node."""
        if event.kind == "model_call":
            data, end = event.data, time.time_ns()
            self.calls.append(
                {
                    "path": event.path,
                    "model": str(data.get("model", "")),
                    "request": shown(data.get("request")),
                    "answer": shown(data.get("answer")),
                    "prompt_tokens": int(data.get("prompt_tokens") or 0),
                    "completion_tokens": int(data.get("completion_tokens") or 0),
                    "start": end - int(float(data.get("seconds") or 0) * 1e9),
                    "end": end,
                }
            )
        else:
            self.nodes.append((event.path, float(event.elapsed or 0.0)))


def shown(value: Any) -> Any:
    """`value` as plain JSON with long texts cut and with the values of secret-looking keys left out."""
    if isinstance(value, Mapping):
        return {str(k): "(left out)" if _secret(str(k)) else shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [shown(v) for v in value]
    if isinstance(value, str):
        cut = len(value) - LONGEST_TEXT
        return value if cut <= 0 else f"{value[:LONGEST_TEXT]} ... ({cut} more characters)"
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return f"({type(value).__name__})"
    return value


def _secret(name: str) -> bool:
    name = name.lower().replace("-", "_")
    return name in {"authorization", "api_key", "x_api_key", "password", "token", "secret", "cookie"}

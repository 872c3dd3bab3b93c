"""The training of a LoRA world as assets: examples, adapters, their evaluation, and the world that they make."""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from resources.mlflow_tracker import MlflowTracker
from wg_defs.step import failures
from wg_defs.worlds import WorldFile

if TYPE_CHECKING:
    from wg_blocks.lora_training import LoraSettings

TRAINING_SECONDS = 24 * 3600


class Training(dg.Config):
    """What to train: the fields of `LoraSettings`."""

    name: str = Field(default="", description="Id of the LoRA world; WORLD_lora where it is empty.")
    sources: list[str] = Field(default=["history"], description="history, or paths of .txt and MediaWiki .xml files.")
    stages: list[str] = Field(default=[], description="Learn from these stages only; all, if none is named.")
    first: int | None = Field(default=None, description="The first step of the history to learn from.")
    last: int | None = Field(default=None, description="The last step of the history to learn from.")
    held_out: float = Field(default=0.2, description="Share of the steps that is not trained on.")
    rank: int = Field(default=8, description="Rank of the adapters.")
    alpha: float | None = Field(default=None, description="Their scale; twice the rank where it is left out.")
    targets: list[str] = Field(
        default=["role:llm"], description="Blocks to adapt: globs over paths, stage:GLOB or role:GLOB."
    )
    modules: list[str] = Field(default=["all-linear"], description="Layers to adapt.")
    per_stage: bool = Field(default=False, description="Adapters of its own for each stage.")
    steps: int | None = Field(default=None, description="Updates; every example is learned twice where it is left out.")
    minutes: float | None = Field(default=None, description="About how long to train, where steps are left out.")
    lr: float = Field(default=3e-4, description="Learning rate.")
    batch_size: int = Field(default=4, description="Examples of one update.")
    eval_every: int = Field(default=0, description="Steps between two held-out losses; 0: two of them.")
    samples: int = Field(default=2, description="Answers to show before and after.")
    seed: int = Field(default=0, description="Seed of split, order and adapters.")
    resume: bool = Field(default=False, description="Go on with an interrupted training, as it was asked for.")
    restart: bool = Field(default=False, description="Forget what was trained under this name.")

    def settings(self, world_id: str) -> "LoraSettings":
        """The checked settings. Raises: ConfigError."""
        from wg_blocks.lora_training import LoraSettings

        given = {k: v for k, v in self.model_dump().items() if k not in ("resume", "restart")}
        return LoraSettings.of({**given, "name": self.name or f"{world_id}_lora"})


class Evaluation(dg.Config):
    """How the LoRA world is compared with its base, and what it has to reach."""

    steps: int = Field(default=3, description="How many steps both live, from equal seeds.")
    seed: int = Field(default=0, description="Seed of their steps.")
    asked: int = Field(
        default=6, description="Held-out requests that are answered without decoding under their schema."
    )
    loss_ratio: float = Field(default=1.0, description="The held-out loss must stay below this times that of the base.")
    valid_share: float = Field(default=0.9, description="Share of the structures that must be valid.")


def training_assets(file: WorldFile, root: Path) -> list[dg.AssetsDefinition]:
    """The assets of training on a world: `[world, training_examples]`, then `[world, lora, adapter | evaluation | world]`.

    They have a group of their own, so that "Materialize all" of the world is a step and trains nothing.
    """
    keys = {name: dg.AssetKey([file.world_id, "lora", name]) for name in ("adapter", "evaluation", "world")}
    examples_key = dg.AssetKey([file.world_id, "training_examples"])
    return [
        _examples(file, root, examples_key),
        _adapter(file, root, keys["adapter"], examples_key),
        _evaluation(file, root, keys["evaluation"], keys["adapter"]),
        _world(file, root, keys["world"], keys["evaluation"]),
    ]


def _examples(file: WorldFile, root: Path, key: dg.AssetKey) -> dg.AssetsDefinition:
    from wg_blocks.examples_check import SAYS

    specs = [dg.AssetCheckSpec(name, asset=key, blocking=True, description=says) for name, says in SAYS.items()]

    @dg.asset(
        key=key, group_name=f"{file.world_id}__training", check_specs=specs, code_version=file.code_version, kinds={"pandas"},
        description=f"What a LoRA world of {file.title} learns from, as one checked table, split by steps.",
    )  # fmt: skip
    def training_examples(context: dg.AssetExecutionContext, config: Training):
        from wg_blocks.examples_check import in_words
        from wg_defs.train import alone, begin, collect_examples

        with failures(context.op_execution_context):
            settings = config.settings(file.world_id)
            with alone(file.world_id, settings.name, root):
                base, settings = begin(Path(file.path), settings, root, resume=config.resume, restart=config.restart)
                examples, table, checks = collect_examples(base, settings, root)
        summary = examples.summary()
        results = [
            dg.AssetCheckResult(
                passed=check.passed, check_name=check.name,
                metadata={} if check.passed else {"rows": dg.MetadataValue.md(in_words(check, 20))},
            )
            for check in checks
        ]  # fmt: skip
        shown = {
            name: dg.MetadataValue.int(summary[name])
            for name in ("rows", "train", "held_out", "units", "answer_characters")
        }
        return dg.MaterializeResult(
            value={"settings": settings.model_dump(mode="json"), "summary": summary},
            metadata={
                **shown, **({"table": dg.MetadataValue.path(str(table))} if table.is_file() else {}), "stages": dg.MetadataValue.json(summary["stages"]),
                "left_out": dg.MetadataValue.json(summary["left_out"]), "first_row": _as_json(examples.rows[0]),
            },
            data_version=dg.DataVersion(summary["hash"]),
            check_results=results,
        )  # fmt: skip

    return training_examples


def _adapter(file: WorldFile, root: Path, key: dg.AssetKey, examples_key: dg.AssetKey) -> dg.AssetsDefinition:
    @dg.asset(
        key=key, group_name=f"{file.world_id}__training", ins={"examples": dg.AssetIn(key=examples_key)}, code_version=file.code_version,
        kinds={"torch", "mlflow"},
        description=f"The adapters of a LoRA world of {file.title}, in PEFT's layout, trained in a process of its own.",
    )  # fmt: skip
    def adapter(
        context: dg.AssetExecutionContext,
        examples: dict[str, Any],
        tracker: MlflowTracker,
        pipes: dg.ResourceParam[dg.PipesSubprocessClient],
    ):
        from wg_defs.train import result_of

        name = examples["settings"]["name"]
        with tempfile.TemporaryDirectory(prefix="wg-train-") as folder:
            failed = Path(folder, "failed.txt")
            request = {
                "file": file.path, "root": str(root), "settings": examples["settings"], "mlflow": tracker.enabled,
                "failed": str(failed),
            }  # fmt: skip
            try:
                command = [sys.executable, "-m", "wg_defs.train"]
                reported = pipes.run(
                    context=context.op_execution_context, command=command, extras={"request": request}
                ).get_materialize_result()
            except Exception:  # Pipes' own is not public; what the process said, if it did, is the reason
                if failed.is_file():
                    raise dg.Failure(failed.read_text(encoding="utf-8"), allow_retries=False) from None
                raise
        with failures(context.op_execution_context):
            made = result_of(file.world_id, name, root)
        samples = "\n\n".join(
            f"**{s['stage']}, step {s['step']}**\n\nbefore: {_quoted(s['text'])}\n\nafter: {_quoted(s['after'])}"
            for s in made["samples"]
        )
        shown = {
            **(reported.metadata or {}), "adapters": dg.MetadataValue.path(made["adapters"]),
            "samples": dg.MetadataValue.md(samples), "training": _as_json(made["training"]),
            "adapted": dg.MetadataValue.json(made["adapted"]), **_tracked(tracker, made),
        }  # fmt: skip
        value = {
            "name": name,
            "adapters": made["adapters"],
            "held_out_loss": made["held_out_loss"],
            "mlflow": made["mlflow"],
        }
        return dg.MaterializeResult(value=value, metadata=shown, data_version=reported.data_version)

    return adapter


def _evaluation(file: WorldFile, root: Path, key: dg.AssetKey, adapter_key: dg.AssetKey) -> dg.AssetsDefinition:
    check = dg.AssetCheckSpec(
        "beside_its_base", asset=key, blocking=True,
        description="The held-out loss is below that of the base, and structures are valid; else no world is written.",
    )  # fmt: skip

    @dg.asset(
        key=key, group_name=f"{file.world_id}__training", ins={"adapter": dg.AssetIn(key=adapter_key)}, check_specs=[check],
        code_version=file.code_version,
        description=f"A LoRA world of {file.title} beside its base: held-out loss, valid structures, diversity, equal seeds.",
    )  # fmt: skip
    def evaluation(
        context: dg.AssetExecutionContext, config: Evaluation, adapter: dict[str, Any], tracker: MlflowTracker
    ):
        from wg_defs.compare import compare_worlds, trained_worlds
        from wg_defs.comparison_report import markdown, metrics

        with failures(context.op_execution_context):
            base, lora = trained_worlds(Path(file.path), adapter["name"], root)
            done = compare_worlds(
                base, lora, tracker=tracker, root=root, steps=config.steps, seed=config.seed, asked=config.asked,
                loss_ratio=config.loss_ratio, valid_share=config.valid_share, tags={"dagster/evaluation_run_id": context.run.run_id}, say=context.log.info,
            )  # fmt: skip
        numbers = {
            name.replace("/", "_"): dg.MetadataValue.float(value) for name, value in metrics(done["report"]).items()
        }
        shown = {
            "comparison": dg.MetadataValue.md(markdown(done["report"], done["wrong"])),
            "side_by_side": dg.MetadataValue.path(done["files"]["html"]), **numbers, **_tracked(tracker, done),
        }  # fmt: skip
        bounds = {
            "loss_ratio": config.loss_ratio,
            "valid_share": config.valid_share,
            "wrong": "; ".join(done["wrong"]) or "nothing",
        }
        passed = dg.AssetCheckResult(passed=not done["wrong"], check_name=check.name, metadata=bounds)
        value = {"name": adapter["name"], "wrong": done["wrong"], "files": done["files"]}
        return dg.MaterializeResult(value=value, metadata=shown, check_results=[passed])

    return evaluation


def _world(file: WorldFile, root: Path, key: dg.AssetKey, evaluation_key: dg.AssetKey) -> dg.AssetsDefinition:
    @dg.asset(
        key=key, group_name=f"{file.world_id}__training", ins={"evaluation": dg.AssetIn(key=evaluation_key)}, code_version=file.code_version,
        description=f"The file of a LoRA world of {file.title}; after 'Reload definitions' it is a world on this page.",
    )  # fmt: skip
    def world(context: dg.AssetExecutionContext, evaluation: dict[str, Any], tracker: MlflowTracker):
        from wg_defs.train import publish, result_of

        with failures(context.op_execution_context):
            written = publish(Path(file.path), evaluation["name"], tracker=tracker, root=root)
            made = result_of(file.world_id, evaluation["name"], root)
        shown = {"world_file": dg.MetadataValue.path(str(written)), **_tracked(tracker, made)}
        if made["model"]:
            shown["model_version"] = dg.MetadataValue.text(f"{made['model']['model']} {made['model']['version']}")
        return dg.MaterializeResult(value={"file": str(written), "name": evaluation["name"]}, metadata=shown)

    return world


def train_name(world_id: str) -> str:
    """The name of the job that trains a LoRA world."""
    return f"{world_id}__train"


def train_job(file: WorldFile, assets: list[dg.AssetsDefinition]) -> dg.JobDefinition:
    """Examples, adapters, evaluation and LoRA world in one run."""
    return dg.define_asset_job(
        train_name(file.world_id),
        selection=dg.AssetSelection.assets(*assets),
        description=f"Train a LoRA world on {file.title}, compare the two, and write its file if it passes.",
        tags={"dagster/max_runtime": str(TRAINING_SECONDS), "wg/world": file.world_id},
    )


def train_through_dagster(path: Path, world_id: str, settings: "LoraSettings", **again: bool) -> dict[str, Any]:
    """Run the job of a world's training on the instance that the page shows: `{ok, run_id, error}`.

    `again` is `resume` or `restart`, as `train` has them. Raises: KeyboardInterrupt, with the way to go on, where the run
    was interrupted.
    """
    from wg_defs.build import build
    from wg_defs.instance import open_instance

    job = build([path]).resolve_job_def(train_name(world_id))
    asked = {**settings.model_dump(mode="json"), **again}
    with open_instance() as instance:
        result = job.execute_in_process(
            instance=instance,
            run_config={
                "ops": {f"{world_id}__training_examples": {"config": asked}},
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            },
            raise_on_error=False,
        )
    failed = next((event for event in result.all_events if event.is_step_failure), None)
    broken = [
        f"{e.asset_key.to_user_string()}: {e.check_name}{_wrong(e)}"
        for e in result.get_asset_check_evaluations()
        if not e.passed
    ]
    error = f"checks failed: {', '.join(broken)}" if broken else ""
    if failed is not None and not error:
        said, raised = failed.step_failure_data.user_failure_data, failed.step_failure_data.error
        if _interrupted(raised):
            raise KeyboardInterrupt(
                "interrupted; what was learned is kept, go on with: "
                f"wg train {world_id} --name {settings.name} --resume --dagster"
            )
        error = (
            said.description if said and said.description else raised.message if raised else "the run failed"
        ).strip()
    return {"ok": result.success and not broken, "run_id": result.run_id, "error": error}


def _wrong(evaluation: dg.AssetCheckEvaluation) -> str:
    """What a failed check says is wrong: rows of the examples, or bounds."""
    said = evaluation.metadata.get("rows") or evaluation.metadata.get("wrong")
    return f": {said.value}" if said else ""


def _interrupted(error: Any) -> bool:
    """Whether an error of a step comes from the end of the process that runs it."""
    while error is not None and error.cls_name != "DagsterExecutionInterruptedError":
        error = error.cause
    return error is not None


def _tracked(tracker: MlflowTracker, made: Mapping[str, Any]) -> dict[str, dg.MetadataValue]:
    shown = tracker.metadata(made["mlflow"])
    if made["mlflow_error"]:
        shown["mlflow_error"] = dg.MetadataValue.text(made["mlflow_error"])
    return shown


def _as_json(value: Any) -> dg.MetadataValue:
    return dg.MetadataValue.md(f"```json\n{json.dumps(value, indent=1, ensure_ascii=False)[:8000]}\n```")


def _quoted(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")[:1000]

"""A LoRA world beside its base: the comparison, its report, and both in MLflow."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.mlflow_tracker import MlflowTracker
from resources.mlflow_training import MlflowTraining
from wg_core.errors import ConfigError
from wg_defs import comparison_report
from wg_defs.train import EXAMPLES, result_of, training_folder, untrained

if TYPE_CHECKING:
    from wg_core.execution.context import Hook
    from wg_core.levels.world import World

COMPARED = "comparison"


def compare_worlds(
    base: "World",
    lora: "World",
    *,
    tracker: MlflowTracker,
    root: Path | None = None,
    steps: int = 3,
    seed: int = 0,
    asked: int = 6,
    loss_ratio: float = 1.0,
    valid_share: float = 0.9,
    tags: Mapping[str, str] | None = None,
    hooks: Sequence["Hook"] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The comparison on the held-out examples of the LoRA world's training: `{report, wrong, files, mlflow}`.

    It is written below the folder of the training, and joins its MLflow run. Raises: ConfigError where the LoRA world
    was not trained on this base here.
    """
    from wg_blocks.comparison import compare, verdict
    from wg_blocks.examples import Examples

    folder = training_folder(base.world_id, lora.world_id, root)
    if not (folder / EXAMPLES).is_file():
        raise ConfigError(
            f"there are no held-out examples of {lora.world_id!r} on {base.world_id!r} in {folder}; "
            f"train it here: wg train {base.world_id} --name {lora.world_id}"
        )
    examples = Examples.load(folder / EXAMPLES)
    place = _new_folder(folder / COMPARED)
    report = compare(base, lora, examples.rows, place, steps=steps, seed=seed, asked=asked, hooks=hooks, say=say)
    wrong = verdict(report, loss_ratio=loss_ratio, valid_share=valid_share)
    files = comparison_report.write(report, place, wrong)
    tracking = MlflowTraining(tracker, base.world_id, lora.world_id, folder)
    if tracking.rejoin():
        tracking.metrics(comparison_report.metrics(report), 0)
        for file in files.values():
            tracking.file(file, COMPARED)
        tracking.tag({"wg/passed": str(not wrong).lower(), **(tags or {})})
    return {
        "report": report, "wrong": wrong, "files": {suffix: str(path) for suffix, path in files.items()},
        "mlflow": tracking.tracking, "mlflow_error": tracking.error,
    }  # fmt: skip


def trained_worlds(file: Path, name: str, root: Path | None = None) -> tuple["World", "World"]:
    """A base and the LoRA world that was trained on it, also before its file is written. Raises: ConfigError."""
    from wg_blocks.lora_training import LoraSettings
    from wg_core.levels.world import World

    base = World.from_yaml(file)
    made = result_of(base.world_id, name, root)
    lora = untrained(base, LoraSettings.of(made["settings"]))
    lora.load_adapters(made["adapters"])
    return base, lora


def _new_folder(parent: Path) -> Path:
    numbers = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    place = parent / f"{max(numbers, default=0) + 1:04d}"
    place.mkdir(parents=True)
    return place

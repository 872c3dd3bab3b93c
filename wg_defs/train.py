"""One training of a LoRA world from beginning to end: what `wg train` calls, and the process that Dagster starts."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.mlflow_tracker import MlflowTracker
from resources.mlflow_training import MlflowTraining
from wg_core.errors import ConfigError, WGError
from wg_core.state.files import write_file
from wg_core.state.home import home

if TYPE_CHECKING:
    from wg_blocks.examples import Examples, Row
    from wg_blocks.examples_check import Check
    from wg_blocks.lora_training import LoraSettings
    from wg_core.execution.context import Hook
    from wg_core.levels.lora_world import LoraWorld
    from wg_core.levels.world import World

SETTINGS, EXAMPLES, RESULT, ADAPTERS = "settings.json", "examples.jsonl", "result.json", "adapters"


def training_folder(world_id: str, name: str, root: Path | None = None) -> Path:
    """Where a training keeps its examples, state and adapters. Raises: ConfigError for names that are no ids."""
    from wg_core.structure.ids import check_id, safe_path

    check_id(world_id, "world id")
    return safe_path(root or home(), "training", world_id, check_id(name, "world id"))


def tracker_of(root: Path | None = None, enabled: bool | None = None) -> MlflowTracker:
    """The tracker that the definitions use too, with all data below `root` (`WG_HOME`)."""
    place = (root or home()).absolute()
    return MlflowTracker(
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place}/mlflow/mlflow.db",
        artifacts=str(place / "mlflow" / "artifacts"),
        ui_url=os.environ.get("WG_MLFLOW_UI", ""),
        enabled=os.environ.get("WG_MLFLOW") != "off" if enabled is None else enabled,
    )


def collect_examples(
    base: "World", settings: "LoraSettings", root: Path | None
) -> tuple["Examples", Path, list["Check"]]:
    """The examples of a training, the file that keeps them, and their checks; made once, at its first begin.

    New ones that do not pass are not kept, so that the next training reads its sources again. Raises: ConfigError for
    too few, and for targets that are no part of the base.
    """
    from wg_blocks.examples import Examples
    from wg_blocks.examples_check import checks

    file = training_folder(base.world_id, settings.name, root) / EXAMPLES
    known = file.is_file()
    examples = Examples.load(file) if known else _fresh(base, settings)
    found = checks(examples)
    if not known and all(check.passed for check in found):
        kept = {"settings": settings.model_dump(mode="json"), "base_hash": base.config_hash}
        write_file(file.parent / SETTINGS, json.dumps(kept, indent=1).encode())
        examples.save(file)
    return examples, file, found


def _fresh(base: "World", settings: "LoraSettings") -> "Examples":
    """New examples, enough of them, for adapters that the base has a place for."""
    from wg_blocks.examples_check import must_suffice
    from wg_blocks.lora_training import LEAST, gather, more_examples

    examples = gather(base, settings)
    must_suffice(examples, LEAST, more_examples(base.world_id, settings))
    untrained(base, settings).close()
    return examples


def train(
    file: Path,
    settings: "LoraSettings",
    *,
    tracker: MlflowTracker,
    root: Path | None = None,
    resume: bool = False,
    restart: bool = False,
    tags: Mapping[str, str] | None = None,
    hooks: Sequence["Hook"] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train adapters for the LoRA world `settings.name` on the world of `file`, and give what came of it as JSON.

    A training that was interrupted goes on where it was, as the same MLflow run, if it is asked for with equal settings
    or by `resume`; `restart` begins anew. The world file is written by `publish`; until it is, a training that came to its
    end gives what it gave.

    Raises: ConfigError for settings that differ from those of the interrupted training, one that runs elsewhere, an id
    that is taken, too few or wrong examples; and what `fit` raises.
    """
    with alone(base_of(file).world_id, settings.name, root) as folder:
        base, settings = begin(file, settings, root, resume=resume, restart=restart)
        if (folder / RESULT).is_file():  # it was stopped between its end and `publish`
            say("it is trained already")
            return result_of(base.world_id, settings.name, root)
        return _train(base, settings, folder, tracker, tags or {}, hooks, say)


@contextmanager
def alone(world_id: str, name: str, root: Path | None = None) -> Iterator[Path]:
    """The folder of a training, which no other process changes meanwhile. Raises: ConfigError where one works in it."""
    from filelock import FileLock, Timeout

    folder = training_folder(world_id, name, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{name!r} is being trained by another process; wait for it, or stop it") from None
    try:
        yield folder
    finally:
        lock.release()


def base_of(file: Path) -> "World":
    """The world of a file as a base. Raises: ConfigError for a LoRA world."""
    from wg_core.levels.lora_world import LoraWorld
    from wg_core.levels.world import World

    world = World.from_yaml(file)
    if isinstance(world, LoraWorld):
        raise ConfigError(
            f"{world.world_id!r} is a LoRA world itself; train another one on its base: wg train {world.base.world_id} --name NAME"
        )
    return world


def begin(
    file: Path, settings: "LoraSettings", root: Path | None, *, resume: bool = False, restart: bool = False
) -> tuple["World", "LoraSettings"]:
    """The base of a training, and its settings as they were kept at its first begin; `restart` forgets all of it.

    What is to be forgotten stays where the new training has no examples. Raises: ConfigError as `train`.
    """
    base, target = base_of(file), lora_file(file, settings.name)
    folder = training_folder(base.world_id, settings.name, root)
    if target.exists() and not (restart and _stands_on(target, base.world_id)):
        again = "" if restart else ", or train that LoRA world anew with --restart"
        raise ConfigError(f"{target} exists already; choose another --name{again}")
    if restart:
        _fresh(base, settings)
        target.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return base, _agreed(folder, base, settings, resume)


def _stands_on(file: Path, world_id: str) -> bool:
    """Whether a file is a LoRA world on this base, also on one that has changed since."""
    from wg_core.assembly.loader import read

    try:
        return read(file).data["execution"]["base"]["world"]["world_id"] == world_id
    except (KeyError, TypeError):
        return False


def _learned_from(base: "World", settings: "LoraSettings", span: Sequence[int]) -> list[str]:
    """The first and last snapshot within the steps of the examples; passages of a text are counted likewise, and are none."""
    steps = base.store.steps(base.world_id) if "history" in settings.sources and span else []
    lived = [step for step in steps if span[0] <= step <= span[1]]
    return [base.store.get(base.world_id, step).id for step in (lived[0], lived[-1])] if lived else []


def _train(
    base: "World", settings: "LoraSettings", folder: Path, tracker: MlflowTracker, tags: Mapping[str, str],
    hooks: Sequence["Hook"], say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    from wg_blocks.examples_check import must_pass
    from wg_blocks.lora_training import loss_on, training_config
    from wg_core.weights.fit import fit

    examples, _, checks = collect_examples(base, settings, folder.parent.parent.parent)
    must_pass(checks)
    started = time.monotonic()
    say("loading the base")
    lora = untrained(base, settings)
    if not lora.trainable_parameters():
        shutil.rmtree(folder)
        raise ConfigError(
            f"modules: no layer of the blocks to adapt matches {', '.join(settings.modules)}; take all-linear, or a glob "
            "such as '*q_proj'"
        )
    config = _config(folder, lambda: training_config(lora, settings, examples))
    report = lora.adapter_report()
    rows = sorted(examples.split("held_out"), key=lambda row: (row["path"], len(row["answer"])))
    base_hash, summary = base.config_hash, examples.summary()
    tracking = MlflowTraining(tracker, base.world_id, settings.name, folder)
    tracking.start(
        {
            "training": config.model_dump(mode="json"), "lora": settings.model_dump(mode="json"),
            "base": {"world": base.world_id, "config_hash": base_hash, "models": json.dumps(base.models())},
            "examples": {k: summary[k] for k in ("hash", "rows", "train", "held_out")}, "code_version": code_version(),
        },
        {
            "wg/steps": "..".join(map(str, summary["steps"])),
            "wg/snapshots": "..".join(_learned_from(base, settings, summary["steps"])),
            "wg/base_hash": base_hash, "wg/examples": summary["hash"], **tags,
        },
    )  # fmt: skip
    status = "FAILED"
    try:
        before = _samples(folder, "before", lora, examples, settings, tracking, say)
        say("training")
        result = fit(
            lora.named_trainable_parameters(), examples.split("train"), loss_on(lora), config,
            held_out=rows, folder=folder, hooks=(tracking, *hooks), resting=lora.resting_hashes(),
        )  # fmt: skip
        after = _samples(folder, "after", lora, examples, settings, tracking, say)
        say("writing the adapters")
        adapters = lora.save_adapters(folder / ADAPTERS)
        losses = list(result.held_out.values())
        best = min(losses)
        made: dict[str, Any] = {
            "world": base.world_id, "name": settings.name, "adapters": str(adapters),
            "settings": settings.model_dump(mode="json"), "training": config.model_dump(mode="json"),
            "examples": summary, "steps": result.steps, "resumed_at": result.resumed_at, "loss": result.loss,
            "held_out_loss": {"base": losses[0], "lora": best, "by_step": {str(k): v for k, v in result.held_out.items()}},
            "seconds": round(time.monotonic() - started, 1), "base_hash": base_hash,
            "adapted": [line.path for line in report if line.adapters],
            "passed_over": {line.path: line.reason for line in report if not line.adapters},
            "samples": [{**b, "after": a["text"]} for b, a in zip(before, after, strict=True)],
        }  # fmt: skip
        version_tags = {"wg/base": base.world_id, "wg/base_hash": base_hash, "wg/examples": summary["hash"]}
        made["model"] = tracking.register(adapters, tags=version_tags)
        made["mlflow"] = tracking.tracking
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        error = tracking.finish(status)
    made["mlflow_error"] = error
    write_file(folder / RESULT, json.dumps(made, indent=1, ensure_ascii=False).encode())
    return made


def untrained(base: "World", settings: "LoraSettings") -> "LoraWorld":
    """The LoRA world of these settings, which does not differ from its base yet."""
    from wg_core.levels.lora_world import lora_world

    return lora_world(
        base, settings.name, rank=settings.rank, alpha=settings.alpha, targets=settings.targets,
        modules=settings.modules, per_stage=settings.per_stage,
    )  # fmt: skip


def lora_file(file: Path, name: str) -> Path:
    """Where the file of a LoRA world goes: beside that of its base."""
    return file.parent / f"{name}.yaml"


def result_of(world_id: str, name: str, root: Path | None = None) -> dict[str, Any]:
    """What `train` gave. Raises: ConfigError where that training is not finished."""
    file = training_folder(world_id, name, root) / RESULT
    if not file.is_file():
        raise ConfigError(f"{name!r} has not been trained on {world_id!r}; train it: wg train {world_id} --name {name}")
    made: dict[str, Any] = json.loads(file.read_bytes())
    return made


def publish(file: Path, name: str, *, tracker: MlflowTracker, root: Path | None = None) -> Path:
    """Write the file of a trained LoRA world, which refers to that of its base; its adapters become the champion.

    Raises: ConfigError where the training is not finished.
    """
    from wg_blocks.lora_training import LoraSettings

    base = base_of(file)
    made, target = result_of(base.world_id, name, root), lora_file(file, name).resolve()
    lora = untrained(base, LoraSettings.of(made["settings"]))
    lora.adapter_folder = Path(os.path.relpath(made["adapters"], target.parent))
    lora.save_config(target, base_file=file.name)
    tracking = MlflowTraining(tracker, base.world_id, name, training_folder(base.world_id, name, root))
    tracking.crown(made["model"])
    return target


def _agreed(folder: Path, base: "World", settings: "LoraSettings", resume: bool) -> "LoraSettings":
    """The settings of this training, as they were kept with its examples if it has begun. Raises: ConfigError."""
    from wg_blocks.lora_training import LoraSettings

    kept, asked = folder / SETTINGS, settings.model_dump(mode="json")
    if not (folder / EXAMPLES).is_file():
        if resume:
            raise ConfigError(
                f"there is no training of {settings.name!r} on {base.world_id!r} to go on with; leave out --resume"
            )
        return settings
    known = json.loads(kept.read_bytes())
    if known["base_hash"] != base.config_hash:
        raise ConfigError(
            f"the training of {settings.name!r} began on {base.world_id!r} as it was ({known['base_hash'][:12]}), which has "
            f"changed since ({base.config_hash[:12]}); restore the world's file, or begin anew with --restart"
        )
    differs = [name for name, value in asked.items() if known["settings"].get(name) != value]
    if differs and not resume:
        raise ConfigError(
            f"an interrupted training of {settings.name!r} has another {' and '.join(differs)}; go on with it: "
            f"wg train {base.world_id} --name {settings.name} --resume; or begin anew with --restart"
        )
    return LoraSettings.of(known["settings"])


def _config(folder: Path, choose: Callable[[], Any]) -> Any:
    """The training config, chosen once: a number of steps that was measured must not change when the training goes on."""
    from wg_core.weights.training_config import TrainingConfig

    file = folder / "training.json"
    if not file.is_file():
        write_file(file, json.dumps(choose().model_dump(mode="json"), indent=1).encode())
    return TrainingConfig.model_validate(json.loads(file.read_bytes()))


def _samples(
    folder: Path, when: str, lora: "World", examples: "Examples", settings: "LoraSettings", tracking: MlflowTraining,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Answers to held-out requests, kept as an artifact; those from before the training are made once."""
    from wg_blocks.lora_training import samples_of

    file = folder / f"samples_{when}.json"
    if not file.is_file():
        found: list[dict[str, Any]] = []
        for row in samples_of(examples, settings.samples, settings.seed):
            say(f"a sample {when} the training: {row['stage']}")
            found.append({"stage": row["stage"], "step": row["step"], "asked": row["messages"][-1]["content"],
                          "recorded": row["answer"], "text": _answer(lora, row, settings.seed)})  # fmt: skip
        write_file(file, json.dumps(found, indent=1, ensure_ascii=False).encode())
    made: list[dict[str, Any]] = json.loads(file.read_bytes())
    tracking.text(_in_words(made), f"samples/{when}.md")
    return made


def _answer(world: "World", row: "Row", seed: int) -> str:
    from wg_blocks.comparison import ask
    from wg_core.errors import OutputContractError

    try:
        return ask(world, row, seed=seed, schema=True)
    except OutputContractError as error:
        return f"(no valid answer: {str(error)[:300]})"


def _in_words(samples: Sequence[Mapping[str, Any]]) -> str:
    def quoted(text: str) -> str:
        return "\n".join(f"> {line}" for line in text.splitlines())

    parts = [
        f"## {s['stage']}, step {s['step']}\n\nAsked:\n\n{quoted(s['asked'])}\n\nAnswer:\n\n{quoted(s['text'])}\n"
        for s in samples
    ]
    return "\n".join(parts) or "No samples were asked for.\n"


def code_version() -> str:
    """The version of this package, and the commit where it runs from a checkout."""
    try:
        found = version("generative-worlds")
    except PackageNotFoundError:
        found = "unknown"
    here = Path(__file__).parent.parent
    if (here / ".git").exists():
        asked = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            found += f"+{asked.stdout.strip()[:12]}"
    return found


def main() -> None:
    """A training that Dagster started through Pipes: the request comes with it, progress and result go back."""
    from dagster_pipes import open_dagster_pipes

    from wg_blocks.lora_training import LoraSettings
    from wg_core.execution.context import Event

    with open_dagster_pipes() as pipes:
        request = pipes.get_extra("request")
        last = 0.0

        def tell(event: Event) -> None:
            nonlocal last
            data = event.data
            if event.kind == "train_eval":
                pipes.log.info(f"step {data['step']} of {data['of']}: held-out loss {data['held_out_loss']:.4f}")
            elif event.kind == "train_step" and time.monotonic() - last > 10:
                last = time.monotonic()
                speed = f", {data['tokens_per_s']:.0f} tokens/s" if data.get("tokens_per_s") else ""
                pipes.log.info(f"step {data['step']} of {data['of']}: loss {data['loss']:.4f}{speed}")

        try:
            made = train(
                Path(request["file"]), LoraSettings.of(request["settings"]), root=Path(request["root"]),
                tracker=tracker_of(Path(request["root"]), request["mlflow"]), resume=True,
                tags={"dagster/run_id": pipes.run_id}, hooks=[tell], say=pipes.log.info,
            )  # fmt: skip
        except WGError as error:
            Path(request["failed"]).write_text(str(error), encoding="utf-8")
            sys.exit(3)
        except KeyboardInterrupt:  # Dagster was stopped, and says so itself
            sys.exit(130)
        losses = made["held_out_loss"]
        shown = {
            "held_out_loss": losses["lora"],
            "base_held_out_loss": losses["base"],
            "steps": made["steps"],
            "seconds": made["seconds"],
        }
        pipes.report_asset_materialization(metadata=shown, data_version=_version(Path(made["adapters"])))


def _version(adapters: Path) -> str:
    """The hash of all files of an adapter folder."""
    from wg_core.state.canonical import sha256_bytes, sha256_json

    files = sorted(p for p in adapters.rglob("*") if p.is_file())
    return sha256_json([[str(p.relative_to(adapters)), sha256_bytes(p.read_bytes())] for p in files])


if __name__ == "__main__":
    main()

"""`wg train` and `wg compare`: a LoRA world from the command line, and how it differs from its base."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wg_core.errors import ConfigError
from wg_defs.verbs import FAILED, OK, Json, WorldName, err, find, open_world, out, print_json, verb

if TYPE_CHECKING:
    from wg_core.execution.context import Event

training_app = typer.Typer()


@training_app.command()
@verb
def train(
    world: WorldName,
    *,
    name: Annotated[str | None, typer.Option(help="Id of the LoRA world; WORLD_lora unless given.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--from", help="What to learn from: history, or a .txt or MediaWiki .xml file; may be repeated."),
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Learn from these stages only; may be repeated.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates; without it every example is learned twice.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="About how long to train, in place of steps.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="Their scale; twice the rank unless given.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Blocks to adapt: globs over paths, stage:GLOB or role:GLOB (role:llm unless given); may be repeated."
        ),
    ] = None,
    modules: Annotated[list[str] | None, typer.Option(help="Layers to adapt: globs, or all-linear.")] = None,
    per_stage: Annotated[bool, typer.Option("--per-stage", help="Adapters of its own for each stage.")] = False,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of one update.")] = 4,
    held_out: Annotated[float, typer.Option(help="Share of the steps that is not trained on.")] = 0.2,
    samples: Annotated[int, typer.Option(min=0, help="Answers to show before and after.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of split, order and adapters.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training, as it was asked for.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what was trained under this name.")] = False,
    dagster: Annotated[
        bool, typer.Option("--dagster", help="As a run on Dagster's page, with checks and comparison.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Train a LoRA world: the base stays as it is, small adapters learn; interrupted, it goes on where it was."""
    from wg_blocks.lora_training import LoraSettings
    from wg_defs.train import publish, tracker_of
    from wg_defs.train import train as work
    from wg_defs.worlds import read_world

    if steps is not None and minutes is not None:
        raise ConfigError("give --steps or --minutes, not both")
    path = find(world)
    file = read_world(path)
    if file is None:
        raise ConfigError(f"{path} is an end world; it is read, never trained")
    given = {
        "name": name or f"{file.world_id}_lora", "sources": source, "stages": stage, "steps": steps, "minutes": minutes,
        "rank": rank, "alpha": alpha, "targets": targets, "modules": modules, "per_stage": per_stage, "lr": lr,
        "batch_size": batch_size, "held_out": held_out, "samples": samples, "seed": seed,
    }  # fmt: skip
    settings = LoraSettings.of({key: value for key, value in given.items() if value is not None})
    if dagster:
        return _through_dagster(path, file.world_id, settings, as_json, resume=resume, restart=restart)
    tracker = tracker_of()
    try:
        with progress(settings.name, shown=not as_json) as (hook, say):
            made = work(path, settings, tracker=tracker, resume=resume, restart=restart, hooks=[hook], say=say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what was learned is kept, go on with: wg train {world} --name {settings.name} --resume"
        ) from None
    made["file"] = str(publish(path, settings.name, tracker=tracker))
    if as_json:
        print_json(made)
    else:
        print_training(made, world)
    return OK


def print_training(made: dict[str, Any], world: str) -> None:
    """What a training came to."""
    loss, rows = made["held_out_loss"], made["examples"]
    out.print(
        f"{made['name']}: {made['steps']} steps on {rows['train']} examples in {made['seconds']:.0f} s; "
        f"held-out loss {loss['base']:.4f} -> {loss['lora']:.4f} nats per token on {rows['held_out']} examples",
        markup=False,
    )
    for reason, paths in _by_reason(made["passed_over"]).items():
        out.print(f"not adapted, since {reason}: {', '.join(paths)}", markup=False)
    for sample in made["samples"]:
        out.print(f"{sample['stage']}, step {sample['step']}", style="bold", markup=False)
        out.print(f"  before: {sample['text'][:300]}", markup=False)
        out.print(f"  after:  {sample['after'][:300]}", markup=False)
    if made["mlflow"]:
        out.print(f"MLflow run {made['mlflow']['run_id']}: {made['mlflow']['url']}", markup=False)
    if made["mlflow_error"]:
        err.print(f"MLflow did not record all of it: {made['mlflow_error']}", style="yellow", markup=False)
    out.print(
        f"{made['file']}: try: wg run {made['name']}; beside its base: wg compare {world} {made['name']}", markup=False
    )


def _by_reason(passed_over: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, reason in passed_over.items():
        found.setdefault(reason, []).append(path)
    return found


@contextmanager
def progress(title: str, *, shown: bool) -> Iterator[tuple[Callable[["Event"], None], Callable[[str], None]]]:
    """A hook and a voice for a training: a bar on a terminal, lines elsewhere, nothing if not `shown`."""
    if not shown:
        yield lambda event: None, lambda text: None
        return
    if not err.is_terminal:
        yield _tell_line, lambda text: err.print(f"{title}: {text}", markup=False)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def hook(event: "Event") -> None:
            data = event.data
            if event.kind == "train_step":
                speed = f", {data['tokens_per_s']:.0f} tokens/s" if data.get("tokens_per_s") else ""
                bar.update(
                    task,
                    completed=data["step"],
                    total=data["of"],
                    description=f"{title}: loss {data['loss']:.3f}{speed}",
                )
            elif event.kind == "train_eval":
                bar.console.print(f"step {data['step']}: held-out loss {data['held_out_loss']:.4f}", markup=False)

        yield hook, lambda text: bar.update(task, description=f"{title}: {text}")


def _tell_line(event: "Event") -> None:
    data = event.data
    if event.kind == "train_eval":
        err.print(f"step {data['step']} of {data['of']}: held-out loss {data['held_out_loss']:.4f}", markup=False)
    elif event.kind == "train_step" and data["step"] % 10 == 0:
        err.print(f"step {data['step']} of {data['of']}: loss {data['loss']:.4f}", markup=False)


def _through_dagster(path: Path, world_id: str, settings: Any, as_json: bool, **again: bool) -> int:
    from wg_defs.training import train_through_dagster

    done = train_through_dagster(path, world_id, settings, **again)
    if as_json:
        print_json(done)
    elif done["ok"]:
        out.print(f"run {done['run_id']}: {settings.name} is trained, compared and written", markup=False)
    else:
        err.print(f"run {done['run_id']} failed: {done['error']}", style="bold red", markup=False)
    return OK if done["ok"] else FAILED


@training_app.command()
@verb
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base world's name, or its file.")],
    lora: Annotated[str, typer.Argument(metavar="LORA", help="The LoRA world's name, or its file.")],
    *,
    steps: Annotated[int, typer.Option(min=0, help="How many steps both live.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of their steps.")] = 0,
    asked: Annotated[
        int, typer.Option(min=0, help="Held-out requests to answer without decoding under their schema.")
    ] = 6,
    loss_ratio: Annotated[
        float, typer.Option(help="The held-out loss must stay below this times that of the base.")
    ] = 1.0,
    valid_share: Annotated[float, typer.Option(help="Share of structures that must be valid.")] = 0.9,
    as_json: Json = False,
) -> int:
    """Compare a LoRA world with its base on held-out examples and on equal seeds; exit code 3 if it does not pass."""
    from wg_defs.compare import compare_worlds
    from wg_defs.comparison_report import numbers
    from wg_defs.train import tracker_of

    first, second = open_world(base), open_world(lora)
    say = (lambda text: None) if as_json else (lambda text: err.print(text, markup=False))
    done = compare_worlds(
        first,
        second,
        tracker=tracker_of(),
        steps=steps,
        seed=seed,
        asked=asked,
        loss_ratio=loss_ratio,
        valid_share=valid_share,
        say=say,
    )
    if as_json:
        print_json(done)
    else:
        from rich.table import Table

        table = Table("", first.world_id, second.world_id, box=None, pad_edge=False)
        for row in numbers(done["report"]):
            table.add_row(*row)
        out.print(table)
        if done["mlflow_error"]:
            err.print(f"MLflow did not record all of it: {done['mlflow_error']}", style="yellow", markup=False)
        for line in done["wrong"]:
            err.print(f"does not pass: {line}", style="bold red", markup=False)
        out.print(f"side by side: {done['files']['html']}", markup=False)
    return FAILED if done["wrong"] else OK

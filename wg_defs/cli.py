"""`wg`: worlds from the command line."""

import logging
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wg_core.errors import ConfigError
from wg_core.structure.ids import safe_path
from wg_defs.cli_files import files_app
from wg_defs.cli_history import history_app
from wg_defs.cli_models import models_app
from wg_defs.cli_training import training_app
from wg_defs.printed import print_profile, print_step, progress, summary
from wg_defs.verbs import FAILED, OK, Json, WorldName, err, find, open_world, out, print_json, verb

if TYPE_CHECKING:
    from wg_core import World
    from wg_core.state.store import Snapshot

Profiled = Annotated[bool, typer.Option("--profile", help="Write where the time goes: a profiler's file and a table of nodes.")]
Profiler = Annotated[Literal["cpu", "torch"], typer.Option(help="cProfile, or PyTorch's profiler with its operators.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Generative worlds.")
app.add_typer(history_app)
app.add_typer(training_app)
app.add_typer(files_app)
app.add_typer(models_app, name="models")


@app.command()
@verb
def run(
    worlds: Annotated[
        list[str], typer.Argument(metavar="WORLD...", help="A world's name, or its file; several step together.")
    ],
    *,
    steps: Annotated[int, typer.Option(min=1, help="How many steps.")] = 1,
    action: Annotated[
        str | None, typer.Option(help="What is done to the world; reaches Development of the first step.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="A JSON file of a state that the first step begins with.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the steps; without one each step draws its own.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="What all steps may ask of models: calls=N,tokens=N,cost=X."),
    ] = None,
    profile: Profiled = False,
    profiler: Profiler = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the whole cycle; no model, no snapshot.")] = False,
    as_json: Json = False,
) -> int:
    """Step a world here, with live progress; several worlds step together, and share the work of their models."""
    from wg_core.errors import JointStepError
    from wg_core.execution.budget import Budget
    from wg_core.state.home import home
    from wg_core.weights.profiling import Profile

    limits = limits_of(budget)
    if len(worlds) > 1 and (state is not None or profile):
        raise ConfigError("--state and --profile are for one world; name the others in a run of their own")
    opened = {world.world_id: world for world in map(open_world, worlds)}
    if len(opened) < len(worlds):
        raise ConfigError(f"a world is named twice in {' '.join(worlds)}; name each once")
    if dry_run:
        for world in opened.values():
            world.dry_run()
            if not as_json:
                out.print(f"{world.world_id}: the cycle is sound; nothing was run", markup=False)
        if as_json:
            print_worlds([{"world": id, "dry_run": True} for id in opened])
        return OK
    given = None
    if state is not None:
        from wg_core import State

        given = State.from_json(state.read_bytes())
    made: dict[str, list[dict[str, Any]]] = {id: [] for id in opened}

    def note(snapshots: "Iterable[Snapshot]", found: Profile | None = None) -> None:
        for snapshot in snapshots:
            id, looked = snapshot.world_id, {}
            if found is not None:
                file = found.write(safe_path(home(), "profiles", id, f"{snapshot.step:06d}"), "step")
                looked = {"profile": {"file": str(file), "nodes": [*map(asdict, found.table())]}}
            if as_json:
                made[id].append(summary(opened[id], snapshot) | looked)
            else:
                print_step(opened[id], snapshot, titles[id])
            if found is not None and not as_json:
                print_profile(found.table(), looked["profile"]["file"])

    titles = {id: world.title if len(opened) == 1 else id for id, world in opened.items()}
    whole = Budget(limits) if limits else None
    for i in range(steps):
        first = {"action": action, "state": given} if i == 0 else {}
        found = Profile(profiler) if profile else None
        try:
            with progress(titles, None if as_json else out) as hook, found or nullcontext():
                hooks = (hook, *([found] if found else []))
                done = one_step(list(opened.values()), seed=seed, hooks=hooks, budget=whole, **first)
        except JointStepError as error:
            note(error.snapshots.values())
            raise
        note(done, found)
    if as_json:
        print_worlds([{"world": id, "steps": found} for id, found in made.items()])
    return OK


def one_step(worlds: "list[World]", *, state: Any = None, **options: Any) -> "list[Snapshot]":
    """A step of one world, or of several together."""
    from wg_core import step_together

    return [worlds[0].step(state=state, **options)] if len(worlds) == 1 else step_together(worlds, **options)


def print_worlds(found: list[dict[str, Any]]) -> None:
    """One document: that of a single world, or of several in a list."""
    print_json(found[0] if len(found) == 1 else {"worlds": found})


def limits_of(budget: str | None) -> dict[str, float]:
    """The limits of `calls=N,tokens=N,cost=X`. Raises: ConfigError."""
    from wg_core.execution.budget import checked_limits

    limits: dict[str, float] = {}
    for part in budget.split(",") if budget else ():
        name, _, value = part.partition("=")
        try:
            limits[name.strip()] = float(value) if name.strip() == "cost" else int(value)
        except ValueError:
            raise ConfigError(f"--budget {part!r}: write calls=N, tokens=N or cost=X, with commas between") from None
    return checked_limits(limits)


@app.command()
@verb
def evolve(
    world: WorldName,
    *,
    steps: Annotated[int, typer.Option(min=1, help="How many steps.")] = 1,
    until: Annotated[int | None, typer.Option(min=0, help="Go on up to this step instead.")] = None,
    action: Annotated[
        str | None, typer.Option(help="What is done to the world; reaches Development of the first step.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the first step.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="LIMITS", help="What each step may ask of models: calls=N,tokens=N,cost=X.")
    ] = None,
    profile: Profiled = False,
    profiler: Profiler = "cpu",
    as_json: Json = False,
) -> int:
    """Step a world through Dagster, models kept loaded; each step is a run on the page."""
    from wg_defs.worker import evolve as work

    limits = limits_of(budget)
    path = find(world)
    opened = open_world(str(path))

    def show(done: Any) -> None:
        if as_json:
            return
        if not done.ok:
            err.print(f"step {done.step} failed (run {done.run_id}): {done.error}", style="bold red", markup=False)
        else:
            print_step(opened, opened.store.get(opened.world_id, done.step))
            out.print(f"run {done.run_id}", markup=False)

    done = work(
        opened.world_id, steps, until=until, action=action, seed=seed, budget=limits, profile=profiler if profile else None,
        folders=[path], on_step=show,
    )  # fmt: skip
    if as_json:
        print_json({"world": opened.world_id, "steps": [d.to_dict() for d in done]})
    return OK if all(d.ok for d in done) else FAILED


@app.command()
@verb
def new(
    name: Annotated[str, typer.Argument(help="The world's id: letters, digits and '_'.")],
    *,
    template: Annotated[str, typer.Option(help="What it begins as.")] = "stub",
    param: Annotated[list[str] | None, typer.Option(help="A parameter of the template, as name=value.")] = None,
    as_json: Json = False,
) -> int:
    """Write a new world file, worlds/NAME.yaml, from a template."""
    from wg_defs.files import new_world, parameters

    path = new_world(name, template, parameters(param or []))
    if as_json:
        print_json({"world": name, "file": str(path)})
    else:
        out.print(f"{path}: a world to edit and run; try: wg run {name}", markup=False)
    return OK


@app.command()
@verb
def dev(
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> int:
    """Open Dagster's page and daemon on this project."""
    from wg_defs.dev import main as start

    start(port=port, host=host)
    return OK


def main() -> None:
    """Entry point of `wg`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    app()


if __name__ == "__main__":
    main()

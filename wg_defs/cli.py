"""`wg`: worlds from the command line."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from wg_core.errors import ConfigError, CorruptSnapshotError, did_you_mean
from wg_core.structure.ids import safe_path
from wg_defs.cli_training import training_app
from wg_defs.verbs import FAILED, OK, Json, WorldName, err, find, open_world, out, print_json, verb

if TYPE_CHECKING:
    from wg_core import World
    from wg_core.state.store import Snapshot
    from wg_core.weights.profiling import NodeTime

Profiled = Annotated[bool, typer.Option("--profile", help="Write where the time goes: a profiler's file and a table of nodes.")]
Profiler = Annotated[Literal["cpu", "torch"], typer.Option(help="cProfile, or PyTorch's profiler with its operators.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Generative worlds.")
models_app = typer.Typer(no_args_is_help=True, help="The model store: list, pull, verify.")
app.add_typer(models_app, name="models")
app.add_typer(training_app)


# ---- worlds ----------------------------------------------------------------------------------------------------------


def at_step(text: str) -> tuple[str, int | None]:
    """`WORLD@STEP` or `WORLD`. Raises: ConfigError."""
    name, at, step = text.partition("@")
    if at and not step.isdigit():
        raise ConfigError(f"{text!r}: after '@' stands the number of a step, as in {name}@3")
    return name, int(step) if at else None


@app.command()
@verb
def validate(file: Annotated[Path, typer.Argument(help="A file of any level.")], *, as_json: Json = False) -> int:
    """Check a world, stage, pipeline or graph file."""
    from wg_core.assembly.build import open_document

    kind, _ = open_document(file)
    level = levels()[kind].from_yaml(file)
    warnings: list[str] = []
    if kind == "world":
        level.dry_run()
    if kind != "end_world":
        warnings = [str(w) for w in level.validate(deep=True).warnings]
    elif problems := level.verify():
        raise CorruptSnapshotError(f"{file} is not whole: {problems[0]}")
    lines = level.adapter_report() if hasattr(level, "adapter_report") else []
    if as_json:
        told = {"adapters": [asdict(line) for line in lines]} if lines else {}
        print_json({"valid": True, "kind": kind, "warnings": warnings, **told})
    else:
        for warning in warnings:
            err.print(f"warning: {warning}", style="yellow", markup=False)
        out.print(f"{file}: a valid {kind}", markup=False)
        for line in lines:
            out.print(f"  {line.path}: {', '.join(line.adapters) or line.reason}", markup=False)
    return OK


def levels() -> dict[str, Any]:
    from wg_core import EndWorld, Graph, Pipeline, Stage, World
    from wg_core.levels.remote import Remote

    return {level.kind: level for level in (Graph, Pipeline, Stage, Remote, World, EndWorld)}


@app.command()
@verb
def plan(
    file: Annotated[Path, typer.Argument(help="A file of any level.")],
    form: Annotated[
        Literal["text", "mermaid", "dot"],
        typer.Option("--format", help="Text, or a picture in Mermaid or Graphviz DOT."),
    ] = "text",
    *,
    as_json: Json = False,
) -> int:
    """Show what a run would do, without doing it: order, loops, models, and the calls and tokens to expect."""
    from wg_blocks.forecast import forecast, totals
    from wg_core.assembly.build import open_document

    kind, _ = open_document(file)
    if kind == "end_world":
        raise ConfigError(f"{file}: an end world is read, never run; there is nothing to plan")
    level = levels()[kind].from_yaml(file)
    if form != "text":
        picture = level.to_mermaid() if form == "mermaid" else level.to_dot()
        if as_json:
            print_json({"kind": kind, "format": form, "picture": picture})
        else:
            print(picture, end="")
        return OK
    stages = level.stages if kind == "world" else {level.id: level}
    texts = {role: "\n".join(_plan_lines(stage)) for role, stage in stages.items()}
    models = ["/".join(block.model_ref()[:3]) for block in level.iter_blocks() if block.model_ref()]
    due = level.due() if kind == "world" else {}
    rows = [
        {**row, "due": due.get(role, True)}
        for role, stage in stages.items()
        if hasattr(stage, "nodes")
        for row in forecast(stage, role if kind == "world" else "")
    ]
    expected = {"full_step": totals(rows), "next_step": totals([row for row in rows if row["due"]])}
    if as_json:
        steps = {role: stage.plan_data() for role, stage in stages.items()}
        print_json(
            {"kind": kind, "plan": texts, "steps": steps, "models": models, "forecast": {"nodes": rows, **expected}}
        )
    else:
        for text in texts.values():
            out.print(text, markup=False)
        out.print(f"models: {', '.join(models) or 'none'}", markup=False)
        if rows:
            print_forecast(rows, expected, "a full step" if kind == "world" else "a run")
    return OK


def print_forecast(rows: list[dict[str, Any]], expected: dict[str, dict[str, int]], what: str) -> None:
    """What a step will ask of language models."""
    table = Table(box=None, pad_edge=False)
    table.add_column("asked of models", no_wrap=True)
    for name in ("calls", "prompt", "context", "answer"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        calls = f"{row['calls']}{' per item' if row['per_item'] else ''}"
        most = f" (at most {row['calls_at_most']})" if row["calls_at_most"] > row["calls"] else ""
        numbers = [str(row[n]) for n in ("prompt_tokens", "context_tokens", "completion_tokens")]
        table.add_row(row["path"], calls + most, *numbers)
    out.print(table)
    ways = " and ".join(sorted({row["counted_by"] for row in rows}))
    out.print(
        f"tokens of one call, counted by {ways}: prompt without what is filled in, room for context, bound of the answer"
    )
    shown = [(what, expected["full_step"])]
    if expected["next_step"] != expected["full_step"]:
        shown.append(("the next step", expected["next_step"]))
    for name, total in shown:
        out.print(
            f"{name}: {total['calls']} calls, about {total['prompt_tokens']} tokens read and what is filled in, "
            f"at most {total['completion_tokens']} written"
        )


def _plan_lines(level: Any, indent: str = "") -> Iterator[str]:
    from wg_core.execution.executable_graph import ExecutableGraph

    first, *rest = level.describe().splitlines()
    yield indent + first
    for line in rest:
        yield indent + line
        node = level.nodes.get(line.strip().split(":")[0])
        if node is not None and isinstance(node.child, ExecutableGraph):
            yield from _plan_lines(node.child, indent + "    ")


@app.command()
@verb
def schema(level: Annotated[str, typer.Argument(help="graph, pipeline, stage, world or end_world.")] = "world") -> int:
    """Print the JSON Schema of a kind of file."""
    from wg_core.assembly.models import KINDS, schema_of

    if level not in KINDS:
        raise ConfigError(f"no level {level!r}; {did_you_mean(level, KINDS)}")
    print_json(schema_of(level))
    return OK


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

        given = State.from_json(state.read_text(encoding="utf-8"))
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


def print_profile(nodes: "Sequence[NodeTime]", file: str, most: int = 15) -> None:
    """Which nodes took the time, and where the profiler's file lies."""
    table = Table("node", box=None, pad_edge=False)
    for name in ("calls", "seconds", "own"):
        table.add_column(name, justify="right")
    for node in nodes[:most]:
        table.add_row(node.path, str(node.calls), f"{node.seconds:.3f}", f"{node.own:.3f}")
    out.print(table)
    out.print(f"Profile: {file}", markup=False)


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


@contextmanager
def progress(titles: dict[str, str], console: Console | None) -> Iterator[Callable[[Any], None]]:
    """A hook that shows which stage of which world runs, and the text as it is written; nothing without a terminal."""
    if console is None or not console.is_terminal:
        yield lambda event: None
        return
    stages: dict[str, tuple[str, float]] = {}
    with console.status("") as status:

        def hook(event: Any) -> None:
            world = event.path.partition("/")[0]
            if event.kind == "stage_start":
                stages[world] = (event.node_id, time.monotonic())
                status.update(f"{titles[world]} step {event.data['step']}: {event.node_id}")
            elif event.kind == "progress":
                stage, since = stages[world]
                done, total = event.data.get("done"), event.data.get("total")
                count = f" {done}/{total}" if total else f" {done}" if done is not None else ""
                text = str(event.data.get("text") or "")[-60:].replace("\n", " ").replace("[", "(")
                status.update(f"{titles[world]}: {stage}{count} ({time.monotonic() - since:.0f} s) {text}")

        yield hook


def pictures(world: "World", state: dict[str, Any]) -> list[dict[str, Any]]:
    """Artifacts of a state with the path of each one's bytes."""
    rows: list[dict[str, Any]] = []
    for artifacts in state.get("artifacts", {}).values():
        for artifact in artifacts:
            rows.append({**artifact, "path": str(artifact_file(world, artifact))})
    return rows


def artifact_file(world: "World", artifact: dict[str, Any]) -> Path:
    """A file with the artifact's bytes under a readable name, next to the world's snapshots."""
    from wg_core.structure.ids import safe_path

    suffix = {"image/png": ".png", "text/plain": ".txt"}.get(artifact["media_type"].split(";")[0], ".bin")
    target = safe_path(world.store.root, world.world_id, "artifacts", artifact["id"][:16] + suffix)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_bytes(world.store.blobs.get(artifact["id"]))
        temporary.replace(target)
    return target


def summary(world: "World", snapshot: "Snapshot") -> dict[str, Any]:
    """What a step did, as data."""
    applied, carried = snapshot.applied or {}, snapshot.carried
    return {
        "step": snapshot.step,
        "id": snapshot.id,
        "story": applied.get("outcome", {}).get("narrative"),
        "intent": carried.get("intent", {}).get("text"),
        "artifacts": pictures(world, carried),
        "stages": [record.model_dump(mode="json") for record in snapshot.stages],
        "usage": snapshot.usage(),
        "seed": snapshot.seed,
        "action": snapshot.action,
    }


def spending(usage: dict[str, dict[str, float]]) -> dict[str, float]:
    """Calls, tokens and cost of all models together."""
    from wg_core.execution.budget import amount_of

    rows = [amount_of(row) for row in usage.values()]
    return {name: sum(row[name] for row in rows) for name in ("calls", "tokens", "cost")}


def print_step(world: "World", snapshot: "Snapshot", title: str | None = None) -> None:
    """The story, where the pictures lie, and what each stage took."""
    data = summary(world, snapshot)
    out.rule(f"{title or world.title}, step {snapshot.step}", align="left")
    if data["story"]:
        out.print(f"Story:  {data['story']}", markup=False)
    for item in (snapshot.applied or {}).get("descriptions", {}).get("items", []):
        out.print(f"Seen:   {item['text']}", markup=False)
    if data["intent"]:
        out.print(f"Next:   {data['intent']}", markup=False)
    for artifact in data["artifacts"]:
        out.print(f"Made:   {artifact['path']}", markup=False)
    table = Table(box=None, pad_edge=False)
    priced = any("cost" in row for record in snapshot.stages for row in record.usage.values())
    columns = ["stage", "seconds", "calls", "tokens", *(["cost"] if priced else []), ""]
    for name in columns:
        table.add_column(name, justify="left" if name in ("stage", "") else "right")
    for record in snapshot.stages:
        used = spending(record.usage)
        note = "" if record.ran else f"skipped: {record.reason}"
        cells = [f"{used['calls']:.0f}" if used["calls"] else "", f"{used['tokens']:.0f}" if used["tokens"] else ""]
        cells += [f"{used['cost']:.6g}" if used["cost"] else ""] if priced else []
        table.add_row(record.role, f"{record.seconds:.2f}" if record.ran else "", *cells, note)
    out.print(table)
    out.print(f"snapshot {snapshot.id[:16]}", markup=False)


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
def history(world: WorldName, *, as_json: Json = False) -> int:
    """List the snapshots of a world, oldest first."""
    opened = open_world(world)
    snapshots = opened.history()
    if as_json:
        print_json([s.model_dump(mode="json") for s in snapshots])
        return OK
    if not snapshots:
        out.print(f"{opened.world_id} has no snapshot yet; make one: wg run {world}", markup=False)
        return OK
    table = Table(box=None, pad_edge=False)
    for name in ("step", "snapshot", "ran", "action", "story"):
        table.add_column(name)
    for s in snapshots:
        ran = sum(r.ran for r in s.stages)
        story = (s.applied or {}).get("outcome", {}).get("narrative") or (s.carried.get("intent", {}).get("text") or "")
        table.add_row(str(s.step), s.id[:12], f"{ran}/{len(s.stages)}", s.action or "", story[:80].replace("[", "("))
    out.print(table)
    return OK


@app.command()
@verb
def show(world: Annotated[str, typer.Argument(metavar="WORLD[@STEP]")], *, as_json: Json = False) -> int:
    """Show one step of a world: the last one, or WORLD@STEP."""
    name, step = at_step(world)
    opened = open_world(name)
    snapshot = opened.store.head(opened.world_id) if step is None else opened.store.get(opened.world_id, step)
    if snapshot is None:
        raise ConfigError(f"{opened.world_id} has no snapshot yet; make one: wg run {name}")
    if as_json:
        print_json(
            {
                **snapshot.model_dump(mode="json"),
                "id": snapshot.id,
                "files": pictures(opened, snapshot.carried),
                "usage": snapshot.usage(),
                "usage_of_world": opened.usage(),
            }
        )
    else:
        print_step(opened, snapshot)
        used = spending(opened.usage())
        cost = f", cost {used['cost']:.6g}" if used["cost"] else ""
        known = sum(row.get("cached_tokens", 0) for row in opened.usage().values())
        again = f" ({known:.0f} of prompts known, not computed again)" if known else ""
        out.print(f"all steps: {used['calls']:.0f} model calls, {used['tokens']:.0f} tokens{again}{cost}", markup=False)
    return OK


@app.command()
@verb
def verify(world: WorldName, *, as_json: Json = False) -> int:
    """Read all of a world's history again and check every hash."""
    opened = open_world(world)
    problems = [str(p) for p in opened.store.verify(opened.world_id)]
    count = 0 if problems else len(opened.history())
    if as_json:
        print_json({"world": opened.world_id, "snapshots": count, "problems": problems})
    elif problems:
        for problem in problems:
            err.print(problem, style="bold red", markup=False)
    else:
        out.print(f"{opened.world_id}: {count} snapshots, every hash holds", markup=False)
    return FAILED if problems else OK


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


def must_have_step(text: str) -> tuple["World", "Snapshot", Path]:
    """The world, step and file of WORLD[@STEP]; without a step the last one. Raises: ConfigError."""
    name, step = at_step(text)
    path = find(name)
    opened = open_world(str(path))
    snapshot = opened.store.head(opened.world_id) if step is None else opened.store.get(opened.world_id, step)
    if snapshot is None:
        raise ConfigError(f"{opened.world_id} has no snapshot yet; make one: wg run {name}")
    return opened, snapshot, path


Step = Annotated[str, typer.Argument(metavar="WORLD[@STEP]", help="A step of a world; the last one if none is named.")]


@app.command()
@verb
def fork(
    world: Step,
    name: Annotated[str, typer.Argument(metavar="NEW", help="Id of the new world.")],
    *,
    as_json: Json = False,
) -> int:
    """Begin a new world with a step of another: history is never changed, it branches."""
    from wg_defs.files import fork_file

    opened, snapshot, path = must_have_step(world)
    file = fork_file(path, opened, name)
    try:
        opened.store.fork(opened.world_id, snapshot.step, name)
    except BaseException:
        file.unlink()
        raise
    if as_json:
        print_json({"world": name, "file": str(file), "origin": f"{opened.world_id}@{snapshot.step}"})
    else:
        out.print(f"{file}: goes on from {opened.world_id} step {snapshot.step}; try: wg run {name}", markup=False)
    return OK


@app.command()
@verb
def diff(
    a: Annotated[str, typer.Argument(metavar="A[@STEP]")],
    b: Annotated[str, typer.Argument(metavar="B[@STEP]")],
    *,
    as_json: Json = False,
) -> int:
    """Show what differs between two steps, of one world or two, as a JSON Patch (RFC 6902) from A to B."""
    (first, before, _), (second, after, _) = must_have_step(a), must_have_step(b)
    patch = first.store.diff(before, after, other=second.store)
    if as_json:
        print_json(patch)
        return OK
    if not patch:
        out.print("no difference")
    for change in patch:
        shown = f" <- {change['from']}" if "from" in change else ""
        value = f" {json.dumps(change['value'], ensure_ascii=False)}" if "value" in change else ""
        out.print(
            f"{change['op']:8}{change['path']}{shown}{value if len(value) <= 160 else value[:157] + '...'}",
            markup=False,
        )
    return OK


@app.command()
@verb
def replay(world: Step, *, as_json: Json = False) -> int:
    """Run a step again from its recorded model calls, asking no model, and compare the snapshots; nothing is kept."""
    opened, snapshot, _ = must_have_step(world)
    done = opened.replay(snapshot.step)
    if as_json:
        print_json(
            {
                "world": done.world_id, "step": done.step, "same": done.same, "recorded": done.recorded_id,
                "replayed": done.replayed_id, "calls_replayed": done.calls, "calls_unused": done.unused_calls,
                "differs": done.differs,
            }
        )  # fmt: skip
    elif done.same:
        out.print(
            f"{done.world_id}@{done.step}: the same snapshot {done.recorded_id[:16]}, from {done.calls} recorded calls; "
            "no model was asked",
            markup=False,
        )
    else:
        err.print(
            f"{done.world_id}@{done.step}: another snapshot, {done.replayed_id[:16]} instead of {done.recorded_id[:16]}; "
            f"what differs: {', '.join(done.differs) or 'the form of the snapshot'}",
            style="bold red",
            markup=False,
        )
    return OK if done.same else FAILED


@app.command()
@verb
def freeze(
    world: Step,
    name: Annotated[str, typer.Argument(metavar="END_WORLD", help="Id of the end world.")],
    *,
    to: Annotated[Path | None, typer.Option("--out", help="Its folder; worlds/END_WORLD unless given.")] = None,
    as_json: Json = False,
) -> int:
    """Write a world's content as an end world: read, linked and quoted, never changed."""
    opened, snapshot, _ = must_have_step(world)
    folder = to or Path("worlds") / name
    opened.freeze(name, folder, step=snapshot.step)
    link = {"target_kind": "end_world", "target_id": name}
    if as_json:
        print_json({"end_world": name, "folder": str(folder), "link": link})
    else:
        out.print(f"{folder}: link a world to it in its content: links: [{json.dumps(link)}]", markup=False)
    return OK


@app.command()
@verb
def gc(
    world: WorldName,
    *,
    max_snapshots: Annotated[
        int | None, typer.Option(min=1, help="Keep only the last so many steps, and those that forks began from.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Keep blobs younger than so many hours.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")] = False,
    as_json: Json = False,
) -> int:
    """Remove blobs that no step of any world in the store needs; with --max-snapshots also old steps of this world."""
    opened = open_world(world)
    done = opened.gc(max_snapshots=max_snapshots, grace_s=grace * 3600, dry_run=dry_run)
    if as_json:
        shown = {"steps": done.steps, "blobs": done.blobs, "bytes": done.bytes, "kept_blobs": done.kept_blobs}
        print_json({"world": opened.world_id, "dry_run": dry_run, "removed": shown})
    else:
        steps = f"{len(done.steps)} steps, " if done.steps else ""
        out.print(f"{'would remove' if dry_run else 'removed'} {steps}{done.blobs} blobs ({done.bytes / 1e6:.1f} MB)")
    return OK


@app.command()
@verb
def export(
    world: WorldName, file: Annotated[Path, typer.Argument(help="The zip file to write.")], *, as_json: Json = False
) -> int:
    """Write a world with its whole history to one archive."""
    from wg_core.levels.transfer import export_world

    opened = open_world(world)
    path = export_world(opened, file)
    if as_json:
        print_json({"world": opened.world_id, "file": str(path), "bytes": path.stat().st_size})
    else:
        out.print(f"{path}: {opened.world_id}, {path.stat().st_size / 1e6:.1f} MB", markup=False)
    return OK


@app.command("import")
@verb
def import_(file: Annotated[Path, typer.Argument(help="What `wg export` wrote.")], *, as_json: Json = False) -> int:
    """Take in a world with its history; every hash is checked before."""
    from wg_core.levels.transfer import import_world
    from wg_core.state.home import home
    from wg_core.state.store import SnapshotStore

    world_id, path = import_world(file, SnapshotStore(home() / "snapshots"), Path("worlds"))
    if as_json:
        print_json({"world": world_id, "file": str(path)})
    else:
        out.print(f"{path}: {world_id} is here; try: wg history {world_id}", markup=False)
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


# ---- models ----------------------------------------------------------------------------------------------------------


@models_app.command("list")
@verb
def models_list(*, as_json: Json = False) -> int:
    """List the known models and which of them are here."""
    from wg_blocks.store import ModelStore

    rows = ModelStore().list()
    if as_json:
        print_json(rows)
        return OK
    table = Table(box=None, pad_edge=False)
    for name in ("name", "use", "licence", "size", "here"):
        table.add_column(name)
    for row in rows:
        size = f"{row['bytes'] / 1e6:.0f} MB"
        table.add_row(row["name"], row["use"], row["licence"] or "", size, "yes" if row["installed"] else "no")
    out.print(table)
    return OK


@models_app.command("pull")
@verb
def models_pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or refs; without any, what the shipped worlds use.")
    ] = None,
    *,
    all_: Annotated[bool, typer.Option("--all", help="Every model of the catalogue.")] = False,
    as_json: Json = False,
) -> int:
    """Fetch models once, checked; afterwards they work offline."""
    from wg_blocks.store import ModelStore, progress_bar

    store = ModelStore()
    wanted = names or [row["name"] for row in store.list() if all_ or row["default"]]
    here = {row["name"] for row in store.list() if row["installed"]}
    paths: dict[str, str] = {}
    for name in wanted:
        with progress_bar() as report:
            paths[name] = str(store.pull(name, report))
        if not as_json:
            out.print(f"{name}: {'was here already' if name in here else 'fetched'}, {paths[name]}", markup=False)
    if as_json:
        print_json(paths)
    return OK


@models_app.command("verify")
@verb
def models_verify(
    name: Annotated[str | None, typer.Argument(help="A model; without it, all that are here.")] = None,
    *,
    as_json: Json = False,
) -> int:
    """Read stored models again and check every hash."""
    from wg_blocks.store import ModelStore

    problems = ModelStore().verify(name)
    if as_json:
        print_json({"problems": problems})
    else:
        for problem in problems:
            err.print(problem, style="bold red", markup=False)
        if not problems:
            out.print("every hash holds")
    return FAILED if problems else OK


# ---- endpoints -------------------------------------------------------------------------------------------------------


@app.command()
@verb
def serve(
    file: Annotated[Path, typer.Argument(help="A file of a graph, pipeline or stage; of a world with --stage.")],
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8321,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a token.")] = "127.0.0.1",
    token_env: Annotated[
        str | None, typer.Option("--token-env", help="Environment variable with the bearer token that callers give.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Which stage of a world.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 4,
    contract: Annotated[
        bool, typer.Option("--contract", help="Print the contract that callers store, and serve nothing.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Run a graph, pipeline or stage for others, over HTTP."""
    import yaml

    from wg_blocks.serve import Limits, served_contract
    from wg_blocks.serve import serve as start
    from wg_core.assembly.build import open_document
    from wg_core.assembly.contract import contract_words
    from wg_core.assembly.loader import Dumper
    from wg_core.state.blobs import FileBlobs
    from wg_core.state.home import home

    kind, _ = open_document(file)
    if kind == "end_world":
        raise ConfigError(f"{file}: an end world is read, never run; there is nothing to serve")
    if (kind == "world") != (stage is not None):
        raise ConfigError(f"{file} is a {kind}; --stage ROLE names a stage of a world, and a world is served by stages")
    level = levels()[kind].from_yaml(file)
    if stage is not None:
        if stage not in level.stages:
            raise ConfigError(
                f"world {level.world_id!r} has no stage {stage!r} to serve; {did_you_mean(stage, level.stages)}"
            )
        level = level.stages[stage]
    if contract:
        words = {"contract": contract_words(served_contract(level))}
        if as_json:
            print_json(words)
        else:
            print(yaml.dump(words, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120), end="")
        return OK

    def ready(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "level": level.level, "id": level.id}), flush=True)
        else:
            out.print(f"{level.level} {level.id} at {url}", markup=False)

    blobs = FileBlobs(home() / "served" / "blobs")
    limits = Limits(concurrency=concurrency)
    start(level, host=host, port=port, token_env=token_env, blobs=blobs, limits=limits, on_ready=ready)
    return OK


def main() -> None:
    """Entry point of `wg`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    app()


if __name__ == "__main__":
    main()

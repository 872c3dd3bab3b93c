"""`wg history` and what else is done with the steps that a world has made."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from wg_core.errors import ConfigError
from wg_defs.printed import pictures, print_step, spending
from wg_defs.verbs import FAILED, OK, Json, WorldName, err, find, open_world, out, print_json, verb

if TYPE_CHECKING:
    from wg_core import World
    from wg_core.state.store import Snapshot

history_app = typer.Typer()


def at_step(text: str) -> tuple[str, int | None]:
    """`WORLD@STEP` or `WORLD`. Raises: ConfigError."""
    name, at, step = text.partition("@")
    if at and not re.fullmatch("[0-9]{1,18}", step):
        raise ConfigError(f"{text!r}: after '@' stands the number of a step, as in {name}@3")
    return name, int(step) if at else None


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


@history_app.command()
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


@history_app.command()
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


@history_app.command()
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


@history_app.command()
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


@history_app.command()
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


@history_app.command()
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


@history_app.command()
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


@history_app.command()
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


@history_app.command()
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


@history_app.command("import")
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

"""What `wg` prints of a step, a plan or a profile, and the line that moves while a world steps."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from wg_core.structure.ids import safe_path
from wg_defs.verbs import out

if TYPE_CHECKING:
    from wg_core import World
    from wg_core.state.store import Snapshot
    from wg_core.weights.profiling import NodeTime


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


def plan_lines(level: Any, indent: str = "") -> Iterator[str]:
    from wg_core.execution.executable_graph import ExecutableGraph

    first, *rest = level.describe().splitlines()
    yield indent + first
    for line in rest:
        yield indent + line
        node = level.nodes.get(line.strip().split(":")[0])
        if node is not None and isinstance(node.child, ExecutableGraph):
            yield from plan_lines(node.child, indent + "    ")


def print_profile(nodes: "Sequence[NodeTime]", file: str, most: int = 15) -> None:
    """Which nodes took the time, and where the profiler's file lies."""
    table = Table("node", box=None, pad_edge=False)
    for name in ("calls", "seconds", "own"):
        table.add_column(name, justify="right")
    for node in nodes[:most]:
        table.add_row(node.path, str(node.calls), f"{node.seconds:.3f}", f"{node.own:.3f}")
    out.print(table)
    out.print(f"Profile: {file}", markup=False)


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

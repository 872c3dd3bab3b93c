"""Training examples for language models: one table whatever they come from, split once, read again as they were.

A row is plain JSON, `{world_id, step, stage, path, messages, answer, schema, split}`: `path` is the block that is to
learn the `answer` to `messages`, `step` the unit that is held out or not as a whole (a step of a history, a section of
a text, a page of a wiki), `schema` the JSON schema that the answer obeys, or None.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wg_core.errors import ConfigError, did_you_mean
from wg_core.execution.context import derive_seed
from wg_core.state.canonical import sha256_json
from wg_core.state.files import write_file

if TYPE_CHECKING:
    from wg_core.execution.block import Block
    from wg_core.levels.world import World

TRAIN, HELD_OUT = SPLITS = ("train", "held_out")
NEAR = 0.8
"""Answers that share this part of their word triples are near-equal (Jaccard index; Broder 1997)."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """A table of examples, and how many rows were left out for what reason."""

    rows: list[Row]
    left_out: dict[str, int] = field(default_factory=dict[str, int])

    def split(self, name: str) -> list[Row]:
        """The rows of `train` or `held_out`."""
        return [row for row in self.rows if row["split"] == name]

    @property
    def hash(self) -> str:
        """The sha256 of the table."""
        return sha256_json(self.rows)

    def steps(self) -> tuple[int, int] | None:
        """The first and last step, None of an empty table."""
        found = [row["step"] for row in self.rows]
        return (min(found), max(found)) if found else None

    def summary(self) -> dict[str, Any]:
        """Numbers for people: rows, units, stages, characters, and what was left out."""
        steps = self.steps()
        return {
            "rows": len(self.rows),
            **{name: len(self.split(name)) for name in SPLITS},
            "units": len({row["step"] for row in self.rows}),
            "steps": list(steps) if steps else [],
            "stages": dict(Counter(row["stage"] for row in self.rows)),
            "answer_characters": sum(len(row["answer"]) for row in self.rows),
            "left_out": self.left_out,
            "hash": self.hash,
        }

    def save(self, file: Path) -> Path:
        """Write the table as JSON Lines."""
        lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in self.rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, lines.encode())
        return file

    @classmethod
    def load(cls, file: Path) -> Examples:
        """Read what `save` wrote. Raises: ConfigError naming the line."""
        rows: list[Row] = []
        for number, line in enumerate(file.read_bytes().splitlines(), 1):  # of bytes: a text may hold other line ends
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{file}:{number}: a row is an object, not {type(row).__name__}")
            rows.append(row)
        return cls(rows)


def make(drafts: Iterable[Row], *, held_out: float = 0.2, seed: int = 0) -> Examples:
    """The table of rows that have no `split` yet: whole units are held out, drawn by `seed`; repeated rows are left out.

    At least one unit is held out and one is not. A row for training that is near-equal to a held-out one is left out,
    so that held-out loss says something. Raises: ConfigError for a share outside 0..1.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out: {held_out} is not between 0 and 1; 0.2 holds out every fifth unit")
    drafts = list(drafts)
    units = sorted({row["step"] for row in drafts}, key=lambda unit: derive_seed(seed, "held out", unit))
    chosen = set(units[: min(max(1, round(len(units) * held_out)), len(units) - 1)]) if units else set[int]()
    seen, rows, left_out = set[str](), list[Row](), Counter[str]()
    for row in drafts:
        row = {**row, "split": HELD_OUT if row["step"] in chosen else TRAIN}
        key = same_key(row)
        if not row["answer"].strip():
            left_out["empty"] += 1
        elif key in seen:
            left_out["repeated"] += 1
        else:
            seen.add(key)
            rows.append(row)
    leaking = {train for train, _ in near_equal(rows)}
    if leaking:
        left_out["near-equal to a held-out row"] = len(leaking)
    return Examples([row for i, row in enumerate(rows) if i not in leaking], dict(left_out))


def same_key(row: Mapping[str, Any]) -> str:
    """What two equal rows share: block, messages and answer."""
    return sha256_json([row["path"], row["messages"], row["answer"]])


def near_equal(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Positions `(train row, held-out row)` whose answers say nearly the same in the same block.

    Answers of fewer than eight words are compared as they are, together with what was asked.
    """
    holders: dict[tuple[str, object], list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for i, row in enumerate(rows):
        if row["split"] == HELD_OUT:
            parts = _shingles(row)
            sizes[i] = len(parts)
            for part in parts:
                holders[row["path"], part].append(i)
    found: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        if row["split"] != TRAIN:
            continue
        parts = _shingles(row)
        shared = Counter(j for part in parts for j in holders.get((row["path"], part), ()))
        found += [(i, j) for j, n in sorted(shared.items()) if n / (len(parts) + sizes[j] - n) >= NEAR][:1]
    return found


def _shingles(row: Mapping[str, Any]) -> set[object]:
    words = re.findall(r"\w+", str(row["answer"]).casefold())
    if len(words) < 8:
        return {(*words, sha256_json(row["messages"]))}
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


# ---- a world's own history -------------------------------------------------------------------------------------------


def learners(world: World) -> dict[str, Block]:
    """The blocks of a world that can learn from examples (they have an `answer_loss`), by path."""
    return {path: block for path, block in world.block_paths() if hasattr(block, "answer_loss")}


def from_history(
    world: World, *, stages: Sequence[str] = (), first: int | None = None, last: int | None = None
) -> Iterator[Row]:
    """A row, still without `split`, of each model call in the published steps of `world`.

    Only calls of blocks that can learn, in `stages` (all, if none is named), from step `first` to step `last`.

    Raises: ConfigError for a stage that no such block is in.
    """
    paths = learners(world)
    known = {path.split("/")[0] for path in paths}
    for stage in stages:
        if stage not in known:
            raise ConfigError(
                f"stage {stage!r} of {world.world_id!r} has no model that can learn; {did_you_mean(stage, known)}"
            )
    for snapshot in world.history():
        if (first is not None and snapshot.step < first) or (last is not None and snapshot.step > last):
            continue
        for stage, calls in world.calls(snapshot).items():
            for call in calls:
                if call["place"] in paths and (not stages or stage in stages):
                    yield {
                        "world_id": world.world_id,
                        "step": snapshot.step,
                        "stage": stage,
                        "path": call["place"],
                        "messages": call.get("messages") or call["request"]["messages"],
                        "answer": call["answer"],
                        "schema": call["request"].get("schema"),
                    }

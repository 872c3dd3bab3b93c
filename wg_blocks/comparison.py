"""A LoRA world beside its base: held-out loss, valid structures, diversity, and how both live from equal seeds."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wg_blocks.examples import HELD_OUT, Row
from wg_blocks.json_schema import problems
from wg_core.errors import ConfigError, JointStepError, NodeExecutionError, OutputContractError
from wg_core.execution.context import Hook, derive_seed
from wg_core.levels.step_together import step_together
from wg_core.levels.training import calling
from wg_core.state.store import SnapshotStore

if TYPE_CHECKING:
    from wg_core.levels.world import World
    from wg_core.state.store import Snapshot

SIDES = ("base", "lora")


def compare(
    base: World,
    lora: World,
    rows: Sequence[Row],
    folder: Path,
    *,
    steps: int = 3,
    seed: int = 0,
    asked: int = 6,
    hooks: Sequence[Hook] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The comparison as plain JSON; pictures are written to `folder`, and neither world's history is touched.

    `rows` are examples, of which the held-out ones count; up to `asked` of those with a schema are also answered
    without decoding under it. Both worlds live `steps` steps from the start of their content.

    Raises: ConfigError where nothing is held out.
    """
    held_out = [row for row in rows if row["split"] == HELD_OUT]
    if not held_out:
        raise ConfigError("nothing is held out, so nothing can be compared; make more examples")
    found: dict[str, Any] = {"seed": seed, "steps": steps, "held_out_rows": len(held_out)}
    structured = [row for row in held_out if row["schema"] is not None]
    structured.sort(key=lambda row: derive_seed(seed, row["step"], row["path"]))
    for side, world in zip(SIDES, (base, lora), strict=True):
        say(f"{world.world_id}: held-out loss")
        found[side] = {"world_id": world.world_id, "config_hash": world.config_hash, **loss_of(world, held_out)}
        say(f"{world.world_id}: free answers")
        found[side]["free"] = free_validity(world, structured[:asked])
    say(f"{base.world_id} and {lora.world_id} live from equal seeds, steps of each: {steps}")
    for side, lived in live(dict(zip(SIDES, (base, lora), strict=True)), folder, steps, seed, hooks).items():
        found[side] |= {"lived": lived, "structures": structures(lived), "diversity": diversity(texts_of(lived))}
    return found


def verdict(report: Mapping[str, Any], *, loss_ratio: float = 1.0, valid_share: float = 0.9) -> list[str]:
    """Why the LoRA world does not pass; nothing if it does.

    Its held-out loss stays below `loss_ratio` times that of the base, and of its structures at least `valid_share` are
    valid (or as many as of the base, where those are fewer).
    """
    base, lora = report["base"], report["lora"]
    wrong: list[str] = []
    if not lora["loss"] < loss_ratio * base["loss"]:
        wrong.append(
            f"held-out loss {lora['loss']:.4f} is not below {loss_ratio:g} times that of the base, {base['loss']:.4f}"
        )
    shares = [side["structures"]["valid_share"] for side in (base, lora)]
    if shares[1] is not None and shares[1] < min(valid_share, 1.0 if shares[0] is None else shares[0]):
        wrong.append(f"{shares[1]:.0%} of the structures are valid; the bound is {valid_share:.0%}")
    return wrong


# ---- what is measured ------------------------------------------------------------------------------------------------


def batches(rows: Sequence[Row], most: int = 4) -> list[list[Row]]:
    """The rows in batches of one path each, alike in length, so that little is padded."""
    by_path: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_path[row["path"]].append(row)
    found: list[list[Row]] = []
    for same in by_path.values():
        same.sort(key=lambda row: sum(len(m["content"]) for m in row["messages"]) + len(row["answer"]))
        found += [same[i : i + most] for i in range(0, len(same), most)]
    return found


def loss_of(world: World, rows: Sequence[Row]) -> dict[str, Any]:
    """`{loss, perplexity, tokens, by_stage}` of the answers: nats per token, and e to that (Jelinek et al. 1977)."""
    import torch

    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for batch in batches(rows):
        with torch.no_grad(), calling(world, batch[0]["path"], training=False) as block:
            loss, tokens = block.answer_loss(batch)
        total = sums[batch[0]["stage"]]
        total[0] += float(loss) * tokens
        total[1] += tokens
    nats, tokens = (sum(pair[i] for pair in sums.values()) for i in (0, 1))
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 50.0)),
        "tokens": int(tokens),
        "by_stage": {stage: pair[0] / pair[1] for stage, pair in sorted(sums.items())},
    }


def ask(world: World, row: Row, *, seed: int, schema: bool, max_new_tokens: int = 320) -> str:
    """What the block of a row answers to its messages in this world, the likeliest token each time."""
    params = {
        "temperature": 0,
        "repetition_penalty": 1,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "context_tokens": 0,
    }
    inputs: dict[str, Any] = {"prompt": row["messages"], "params": params}
    if schema and row["schema"] is not None:
        inputs["schema"] = row["schema"]
    with calling(world, row["path"], training=False, seed=seed) as block:
        return str(block.forward(inputs)["text"])


def free_validity(world: World, rows: Sequence[Row]) -> dict[str, Any]:
    """How many answers obey their schema when decoding is not held to it: what the model has learned of the form."""
    valid = 0
    for row in rows:
        try:
            value = json.loads(ask(world, row, seed=0, schema=False))
        except ValueError:
            continue
        valid += not problems(row["schema"], value)
    return {"asked": len(rows), "valid": valid, "valid_share": valid / len(rows) if rows else None}


def live(
    worlds: Mapping[str, World], folder: Path, steps: int, seed: int, hooks: Sequence[Hook] = ()
) -> dict[str, list[dict[str, Any]]]:
    """`steps` steps of the worlds together, from the start of their content, each in a store of its own, by side.

    A step that fails is told.
    """
    scratch = {side: copy(world) for side, world in worlds.items()}
    for side, world in scratch.items():
        world.hooks = []
        world.store = SnapshotStore(folder / "snapshots" / side)
    lived: dict[str, list[dict[str, Any]]] = {side: [] for side in scratch}
    for number in range(steps):
        errors: Mapping[str, Exception] = {}
        try:
            done = step_together(list(scratch.values()), seed=derive_seed(seed, number), hooks=hooks)
            made = {snapshot.world_id: snapshot for snapshot in done}
        except JointStepError as error:
            made, errors = error.snapshots, error.errors
            if not all(isinstance(e, (NodeExecutionError, OutputContractError)) for e in errors.values()):
                raise
        for side, world in scratch.items():
            if world.world_id in made:
                lived[side].append(_entry(world, made[world.world_id], number, folder, side))
            else:
                said = str(errors[world.world_id])[:2000]
                lived[side].append(
                    {"number": number, "error": said, "story": "", "intent": "", "seen": [], "pictures": []}
                )
    return lived


def _entry(world: World, snapshot: Snapshot, number: int, folder: Path, side: str) -> dict[str, Any]:
    applied, carried = snapshot.applied or {}, snapshot.carried
    pictures: list[str] = []
    for artifacts in carried.get("artifacts", {}).values():
        for artifact in artifacts:
            if str(artifact["media_type"]).startswith("image/"):
                file = (
                    folder
                    / f"{side}_{number}_{len(pictures)}.{'png' if artifact['media_type'] == 'image/png' else 'img'}"
                )
                file.write_bytes(world.store.blobs.get(artifact["id"]))
                pictures.append(file.name)
    asked = [call for calls in world.calls(snapshot).values() for call in calls if call["request"].get("schema")]
    return {
        "number": number,
        "snapshot": snapshot.id,
        "story": applied.get("outcome", {}).get("narrative", ""),
        "intent": carried.get("intent", {}).get("text", ""),
        "seen": [str(item["text"]) for item in applied.get("descriptions", {}).get("items", [])],
        "pictures": pictures,
        "structured": len(asked),
        "first_try": sum(call.get("usage", {}).get("calls", 1) == 1 for call in asked),
        "seconds": round(sum(record.seconds for record in snapshot.stages), 2),
    }


def structures(lived: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the structures that were asked for: how many are valid, and how many at the first try."""
    valid = sum(step.get("structured", 0) for step in lived)
    failed = sum("error" in step for step in lived)
    first = sum(step.get("first_try", 0) for step in lived)
    asked = valid + failed
    return {
        "asked": asked,
        "valid_share": valid / asked if asked else None,
        "first_try_share": first / asked if asked else None,
    }


def texts_of(lived: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stories and intents of lived steps."""
    return [str(step[name]) for step in lived for name in ("story", "intent") if step[name]]


def diversity(texts: Sequence[str]) -> dict[str, Any]:
    """Distinct words and distinct pairs of words over all of them (distinct-n, Li et al. 2016, arXiv:1510.03055)."""
    words = [re.findall(r"\w+", text.casefold()) for text in texts]
    found: dict[str, Any] = {"texts": len(texts), "words": sum(map(len, words))}
    for n in (1, 2):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        found[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    return found

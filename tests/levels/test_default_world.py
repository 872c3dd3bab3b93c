"""The default world with its real models, from the model store."""

from __future__ import annotations

from pathlib import Path

import pytest

from wg_core import State, World
from wg_core.execution.context import FRAME, Frame, RunOptions
from wg_core.state.store import SnapshotStore

pytestmark = pytest.mark.slow


def test_tidewater_lives_two_steps_and_replays(tmp_path: Path) -> None:
    """03 O-1, O-2, O-5, W-20, W-22: real text under schemas, a real map, measured facts, one loaded language model."""
    world = World.from_yaml("worlds/tidewater.yaml")
    world.store = SnapshotStore(tmp_path / "snapshots")
    first = world.step(seed=11, action="a storm lands")
    (model,) = (b for b in world.iter_blocks() if b.block_type == "llm/hf")
    loaded = model.module  # type: ignore[attr-defined]
    second = world.step(first, seed=11)
    assert model.module is loaded  # type: ignore[attr-defined]
    assert sum(p.numel() for p in loaded.parameters()) > 130_000_000

    assert [r.ran for r in first.stages] == [False, False, False, True, True, True]
    assert all(r.ran for r in second.stages)
    assert second.models["llm/hf/local/smollm2-135m-instruct"]
    usage = {r.role: r.usage for r in second.stages}
    for role in ("philosopher", "author", "development", "architect"):
        assert usage[role]["smollm2-135m-instruct"]["completion_tokens"] > 0, role

    applied = second.applied or {}
    assert State.of(applied).filled() == {1, 2, 3, 4, 5}
    assert len(applied["outcome"]["narrative"]) > 40 and applied["outcome"]["changes"]
    (picture,) = applied["artifacts"]["images"]
    assert world.store.blobs.get(picture["id"]).startswith(b"\x89PNG")
    assert picture["made_by"]["models"] == ["image/terrain:terrain-consistency"]

    measure = next(b for b in world.iter_blocks() if b.block_type == "map/measure")
    token = FRAME.set(Frame("world", "tidewater", RunOptions(blobs=world.store.blobs)))
    try:
        again = measure.run({"artifacts": applied["artifacts"]})
    finally:
        FRAME.reset(token)
    (item,) = applied["descriptions"]["items"]
    assert item["facts"] == {k: v for k, v in again["facts"][0].items() if k != "artifact_id"}
    assert item["text"].startswith(again["sentences"][0])

    assert world.store.verify("tidewater") == []
    assert world.replay(1).same

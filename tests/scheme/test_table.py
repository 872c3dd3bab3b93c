"""The table of the first step and of states given by a user, row by row (03 W-13), on the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from wg_core import State, World
from wg_core.assembly.models import CANONICAL as ROLES
from wg_core.state.store import SnapshotStore

ALL = frozenset(ROLES)
BACK = frozenset({"development", "architect", "creator"})

# blocks given -> roles that run
TABLE = {
    (): BACK,
    (1,): BACK,
    (1, 2): BACK,
    (1, 2, 3): ALL,
    (1, 2, 3, 4): ALL - {"philosopher"},
    (1, 2, 3, 4, 5): ALL - {"philosopher", "author"},
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World.from_template("stub", world_id="table")
    made.store = SnapshotStore(tmp_path / "snapshots")
    return made


@pytest.mark.parametrize("blocks", TABLE, ids=lambda b: ",".join(map(str, b)) or "nothing")
def test_row(world: World, blocks: tuple[int, ...]) -> None:
    """03 W-13, W-6, W-10: which stages run on a given state, and what becomes of it."""
    state = world.example_state(blocks) if blocks else None
    if state is not None:
        assert state.filled() == set(blocks)
    snapshot = world.step(state=state, seed=3)
    assert {r.role for r in snapshot.stages if r.ran} == TABLE[blocks]
    assert [r.role for r in snapshot.stages] == list(ROLES)
    assert all(r.reason for r in snapshot.stages if not r.ran)
    assert State.of(snapshot.carried).filled() == {1, 2, 3}
    update = next(r for r in snapshot.stages if r.role == "world_update")
    if update.ran:
        assert State.of(snapshot.applied or {}).filled() == {1, 2, 3, 4, 5}
        assert world.content(snapshot.content).chronicle_length == 1
    else:
        assert snapshot.applied is None
        assert world.content(snapshot.content).chronicle_length == 0
        if blocks:
            assert "dropped: intent" in update.reason


@pytest.mark.parametrize("blocks", [(2,), (3,), (5,), (1, 3), (2, 3, 4)], ids=str)
def test_partial_states_are_dropped_and_said_so(world: World, blocks: tuple[int, ...]) -> None:
    """03 W-10: a state that was not full never reaches the content."""
    state = world.example_state(blocks)
    assert state.filled() == set(blocks)
    snapshot = world.step(state=state, seed=3)
    update = next(r for r in snapshot.stages if r.role == "world_update")
    assert not update.ran and "the state is dropped" in update.reason
    assert {r.role for r in snapshot.stages if r.ran} == BACK


def test_an_action_reaches_development_only(world: World) -> None:
    """03 W-14: an action is context for Development; it fills nothing by itself."""
    seen: list[tuple[str, str]] = []

    def hook(event: object) -> None:
        inputs = getattr(event, "inputs", None) or {}
        if event.kind == "node_start" and any("a whale" in str(v) for v in inputs.values()):  # type: ignore[attr-defined]
            seen.append(event.path)  # type: ignore[attr-defined]

    world.step(seed=1)
    snapshot = world.step(action="a whale comes in", seed=1, hooks=(hook,))
    assert snapshot.action == "a whale comes in"
    assert seen and all("/development" in path for path in seen)

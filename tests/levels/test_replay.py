"""Replay: recorded calls, the very same snapshot, no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wg_core import World
from wg_core.assembly.models import CANONICAL as ROLES
from wg_core.errors import ConfigError, CorruptSnapshotError, ReplayError
from wg_core.execution.calls import CallLog
from wg_core.state.canonical import canonical_bytes


def stub(root: Path, **changes: Any) -> World:
    config = World.from_template("stub", world_id="trial", seed=5).to_config()
    for stage in config["execution"]["stages"].values():
        for node in stage["graph"]["nodes"]:
            if node.get("block_type") == "llm/fake" and "script" in changes:
                node["config"] = {"script": changes["script"]}
            if node["node_id"] == "prompt" and "prompt" in changes:
                node["config"]["template"] += changes["prompt"]
    world = World.from_config(config)
    world.set_storage(root)
    return world


class Count:
    """Counts calls of models."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, event: Any) -> None:
        self.calls += event.kind == "model_call"


def test_every_step_replays_to_the_same_snapshot_without_a_call(tmp_path: Path) -> None:
    """Design, `wg replay`: request, answer and seed are recorded; the step re-runs with zero calls to the same hash."""
    world = stub(tmp_path)
    first, again = Count(), Count()
    snapshots = [world.step(action="a storm" if i == 1 else None, hooks=(first,)) for i in range(3)]
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    done = [world.replay(step, hooks=(again,)) for step in range(3)]
    assert first.calls == sum(d.calls for d in done) == 10 and again.calls == 0
    assert [(d.same, d.replayed_id, d.unused_calls, d.differs) for d in done] == [
        (True, s.id, 0, {}) for s in snapshots
    ]
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()) == before
    (call,) = world.calls(snapshots[2])["author"]
    assert call["place"] == "author/write/write/llm" and call["model"] == "fake" and call["answer"]
    assert {"messages", "context", "schema", "settings", "seed"} <= set(call["request"]) and call["usage"]["calls"] == 1


def test_the_record_is_no_part_of_the_identity(tmp_path: Path) -> None:
    """03 C-4: calls lie in `run`; a history without them has the same ids, and its steps cannot be replayed."""
    world, plain = stub(tmp_path / "a"), stub(tmp_path / "b")
    with_calls = world.step()
    without = plain.step(calls=CallLog())
    assert with_calls.calls() and not without.calls() and with_calls.id == without.id
    with pytest.raises(ReplayError, match="not among the recorded calls"):
        plain.replay()


def test_answers_come_from_the_record_not_from_the_model(tmp_path: Path) -> None:
    """A model that answers otherwise at every call is replayed exactly, so the answers are those of the record."""
    texts = [{"text": f"Ada counts the {w} shells."} for w in ("red", "green", "blue")]
    config = World.from_template("stub", world_id="trial", seed=5).to_config()
    nodes = config["execution"]["stages"]["development"]["graph"]["nodes"]
    next(n for n in nodes if n["node_id"] == "llm")["config"] = {"script": texts}
    config["execution"]["stages"]["development"]["inputs"] = {"world": "world", "action": "action"}
    exposed = config["execution"]["stages"]["development"]["graph"]["exposed_inputs"]
    config["execution"]["stages"]["development"]["graph"]["exposed_inputs"] = [
        x for x in exposed if x["name"] != "schema"
    ]
    nodes[-1]["defaults"] = {
        "schema": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    }
    world = World.from_config(config)
    world.set_storage(tmp_path)
    said = [s.carried["intent"]["text"] for s in world.evolve(3)]
    assert said == [t["text"] for t in texts]
    assert [world.replay(step).same for step in (2, 0, 1, 0)] == [True] * 4
    assert world.step().carried["intent"]["text"] == texts[0]["text"]  # replays took nothing from the script


def test_a_changed_world_is_a_named_error_or_a_difference(tmp_path: Path) -> None:
    """A request that is not in the record is a named error; another config that asks the same is a difference."""
    world = stub(tmp_path)
    list(world.evolve(2))
    with pytest.raises(ReplayError, match="philosopher/describe/describe/llm: this request"):
        stub(tmp_path, prompt=" Hm.").replay()
    config = world.to_config()
    config["execution"]["stages"]["creator"]["graph"]["nodes"][0]["config"]["makers"]["map"]["block"]["config"][
        "size"
    ] = 128
    other = World.from_config(config)
    other.set_storage(tmp_path)
    done = other.replay(1)
    assert not done.same and {"config_hash", "carried"} <= set(done.differs)


def test_a_resumed_step_keeps_the_calls_from_before_the_crash(tmp_path: Path) -> None:
    """03 C-10: journaled stages bring their calls along, so the step replays whole."""
    world = stub(tmp_path)
    world.step()
    flow = world.begin()
    for role in ROLES[:4]:
        flow = world.run_stage(role, flow)
    world.abandon(flow)
    again, count = stub(tmp_path), Count()
    snapshot = again.step(hooks=(count,))
    assert count.calls == 1  # Architect alone
    assert set(snapshot.calls()) == {"philosopher", "author", "development", "architect"}
    assert again.replay().same


def test_what_cannot_be_replayed_says_why(tmp_path: Path) -> None:
    world = stub(tmp_path)
    with pytest.raises(ConfigError, match="no snapshot yet"):
        world.replay()
    list(world.evolve(4))
    fork = world.fork("other", 2)
    with pytest.raises(ReplayError, match="wg replay trial@2"):
        fork.replay()
    fork.step()
    assert fork.replay().same  # the step after goes on from the forked one
    world.gc(max_snapshots=1, grace_s=0)  # leaves 2, which was forked, and 3
    assert world.replay(3).same
    with pytest.raises(ReplayError, match="was removed"):
        world.replay(2)
    sha = world.history()[-1].calls()["author"]
    world.store.blobs.path(sha).write_bytes(b"{}")
    assert any("calls of author" in problem for problem in world.verify())
    with pytest.raises(CorruptSnapshotError):
        world.calls(world.history()[-1])


def test_equal_requests_of_one_place_are_answered_in_order() -> None:
    log = CallLog()
    answers = iter(["one", "two", "three"])
    for place in ("a", "a", "b"):
        assert log.recall(place, "m", {"q": 1}) is None
        log.keep(place, "m", {"q": 1}, {"answer": next(answers)})
    replay = CallLog(log.calls)
    found = [replay.recall(p, "m", {"q": 1}) for p in ("a", "b", "a")]
    assert [call["answer"] for call in found if call] == ["one", "three", "two"]
    assert replay.unused == 0
    with pytest.raises(ReplayError, match="a: this request to 'm'"):
        replay.recall("a", "m", {"q": 1})


def test_an_answer_reads_as_it_will_in_a_replay() -> None:
    """03 C-10: a record is stored with sorted keys and lists; who shows an answer in a prompt shows the same."""
    made = {"answer": {"b": (1, 2), "a": 0}}
    given, told = CallLog().keep("g/llm", "m", {}, made)["answer"], json.loads(canonical_bytes(made))["answer"]
    assert list(given.items()) == list(told.items()) == [("a", 0), ("b", [1, 2])]

"""World: steps, flow seam, resume, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from wg_core import Flow, World
from wg_core.assembly.models import CANONICAL as ROLES
from wg_core.errors import ConfigError, OutputContractError, SnapshotConflictError
from wg_core.state.canonical import sha256_json
from wg_core.state.store import SnapshotStore


def stub(tmp_path: Path, world_id: str = "trial") -> World:
    world = World.from_template("stub", world_id=world_id)
    world.store = SnapshotStore(tmp_path / "snapshots")
    return world


def test_evolves_by_itself(tmp_path: Path) -> None:
    """03 W-12: a world needs nobody; every step goes on from the one before."""
    world = stub(tmp_path)
    assert [s.step for s in world.evolve(3, seed=5)] == [0, 1, 2]
    history = world.history()
    assert [s.parent for s in history] == [None, history[0].id, history[1].id]
    assert history[2].given == history[1].carried
    assert world.content().chronicle_length == 2
    assert world.store.verify("trial") == []


def test_equal_seeds_give_equal_histories(tmp_path: Path) -> None:
    """02 G-44, 03 C-10: same seed, config and models, same snapshots."""
    first, second = stub(tmp_path / "a"), stub(tmp_path / "b")
    assert [s.id for s in first.evolve(3, seed=5)] == [s.id for s in second.evolve(3, seed=5)]
    assert [s.id for s in stub(tmp_path / "c").evolve(3, seed=6)] != [s.id for s in first.history()]


def test_steps_of_one_seed_differ(tmp_path: Path) -> None:
    """A world with a fixed seed does not repeat itself."""
    world = stub(tmp_path)
    assert len({sha256_json(s.carried) for s in world.evolve(4, seed=5)}) == 4


def test_the_seam_equals_step(tmp_path: Path) -> None:
    """03 W-28: begin, run_stage, commit with the flow through JSON is the same as step."""
    world, other = stub(tmp_path / "a"), stub(tmp_path / "b")
    flow = world.begin(seed=9, action="a storm lands")
    for role in ROLES:
        flow = Flow.model_validate_json(world.run_stage(role, flow).model_dump_json())
    assert world.commit(flow).id == other.step(seed=9, action="a storm lands").id


def test_an_older_snapshot_cannot_be_stepped(tmp_path: Path) -> None:
    """03 C-6: history is never changed; the error names the way: fork."""
    world = stub(tmp_path)
    first = world.step(seed=1)
    world.step(first, seed=1)
    with pytest.raises(SnapshotConflictError, match="fork"):
        world.step(first, seed=1)
    assert len(world.history()) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [({"action": b"a storm"}, "an action is a text"), ({"seed": 1.5}, "a seed is a whole number"), ({"seed": True}, "not True")],
)
def test_what_is_no_action_or_seed_is_refused(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    """03 W-14: by name, before the world is taken."""
    world = stub(tmp_path)
    with pytest.raises(ConfigError, match=says):
        world.step(**given)
    assert world.history() == [] and world.step(seed=1, action="a storm").step == 0


def test_an_unfinished_step_cannot_be_published(tmp_path: Path) -> None:
    world = stub(tmp_path)
    flow = world.run_stage("philosopher", world.begin(seed=1))
    with pytest.raises(OutputContractError, match="not complete"):
        world.commit(flow)
    world.abandon(flow)
    assert world.history() == []


def test_a_failed_stage_leaves_a_world_that_steps_on(tmp_path: Path) -> None:
    """03 C-10: the lease is given back, nothing is published, the next try succeeds."""
    world = stub(tmp_path)
    world.step(seed=1)
    config = world.to_config()
    config["execution"]["stages"]["creator"]["graph"]["nodes"][0]["config"]["makers"]["map"]["slot"] = "pictures"
    broken = World.from_config(config)
    broken.store = world.store
    flow = broken.begin(seed=1)
    broken.abandon(flow)
    assert world.step(seed=1).step == 1


def test_journaled_stages_are_not_run_again(tmp_path: Path) -> None:
    """03 C-10: results from before a crash are taken over, and the history is the same."""
    world, undisturbed = stub(tmp_path / "a"), stub(tmp_path / "b")
    flow = world.begin(seed=4)
    for role in ROLES[:4]:
        flow = world.run_stage(role, flow)
    again = stub(tmp_path / "a")  # the process died here; a new one begins the same step
    resumed: list[str] = []
    snapshot = again.step(seed=4, hooks=(lambda e: resumed.append(e.node_id) if e.data.get("resumed") else None,))
    assert resumed == ["development"]
    assert snapshot.id == undisturbed.step(seed=4).id


def test_editing_content_after_step_0_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """03 W-25: content seeds step 0 only."""
    world = stub(tmp_path)
    world.step(seed=1)
    config = world.to_config()
    config["content"]["style"] = "Ornate."
    edited = World.from_config(config)
    edited.store = world.store
    edited.step(seed=1)
    assert "fork" in caplog.text
    assert edited.content().style == "Plain."


def test_config_round_trip(tmp_path: Path) -> None:
    """02 G-51, 03 W-17: a world's config builds an equal world."""
    world = stub(tmp_path)
    again = World.from_config(json.loads(json.dumps(world.to_config())))
    assert again.to_config() == world.to_config()
    assert again.config_hash == world.config_hash


def test_one_model_is_one_instance_in_all_stages() -> None:
    """03 W-20: the five stages of the default world hold the very same language model; nothing is loaded to see it."""
    world = World.from_yaml("worlds/tidewater.yaml")
    models = [b for b in world.iter_blocks() if b.block_type == "llm/hf"]
    assert len(models) == 1
    users = [
        n.child
        for s in world.stages.values()
        for p in s.nodes.values()
        for g in p.child.nodes.values()
        for n in g.child.nodes.values()
    ]
    assert sum(b is models[0] for b in users) == 4


def test_dry_run_touches_nothing(tmp_path: Path) -> None:
    """03 W-16."""
    world = World.from_yaml("worlds/tidewater.yaml")
    world.store = SnapshotStore(tmp_path / "snapshots")
    assert set(world.dry_run()) == set(ROLES) - {"world_update"}
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "cycle: canonical",
            "cycel: canonical",
            r"tidewater.yaml:\d+: execution.cycel: unknown key 'cycel'; did you mean 'cycle'",
        ),
        ("block_type: llm/hf", "block_type: llm/gf", r"block type 'llm/gf' is not registered; did you mean 'llm/hf'"),
        ("kind: world", "kind: {a: world}", r"tidewater.yaml:\d+: kind: unknown kind"),
        ("world_id: tidewater", "world_id: tide water", r"tidewater.yaml:\d+: world_id"),
        ("graphs/author.yaml", "graphs/autor.yaml", r"tidewater.yaml:\d+: .*there is no file 'graphs/autor.yaml'"),
        ("graphs/author.yaml", "../../etc/passwd", r"leaves the folder"),
        ("outputs: {outcome: outcome}", "outputs: {outcom: outcome}", r"fills 'outcom'; did you mean 'outcome'"),
        (
            "intent: intent.text, seen",
            "intent: intents.text, seen",
            r"comes from 'intents.text'; did you mean 'intent'",
        ),
    ],
)
def test_a_wrong_file_ends_in_one_clear_message(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Unknown key, missing block type, bad id, broken reference: file, line, path and the way out."""
    import shutil

    shutil.copytree("worlds", tmp_path / "worlds")
    file = tmp_path / "worlds" / "tidewater.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        World.from_yaml(file)


def test_a_step_that_is_broken_off_after_every_stage_ends_like_one_that_is_not(tmp_path: Path) -> None:
    """03 C-5, C-10: what another process takes over from the journal reads like what the stage itself handed on."""
    cycle = stub(tmp_path).cycle
    for step in range(3):
        for done in range(1, len(cycle)):
            world = stub(tmp_path)
            flow = world.begin(seed=2)
            for role in cycle[:done]:
                flow = world.run_stage(role, flow)
            world.abandon(flow)
        assert stub(tmp_path).step(seed=2).step == step
    undisturbed = stub(tmp_path / "b")
    assert [s.id for s in undisturbed.evolve(3, seed=2)] == [s.id for s in stub(tmp_path).history()]


def test_a_killed_run_leaves_a_world_that_steps_on(tmp_path: Path) -> None:
    """03 C-5, C-10: SIGKILL in the middle of stepping; the next process goes on and every hash holds."""
    code = (
        "from wg_core import World\nfrom wg_core.state.store import SnapshotStore\nimport sys\n"
        "w = World.from_template('stub', world_id='trial')\nw.store = SnapshotStore(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "for s in w.evolve(100, seed=2): print(s.step, flush=True)\n"
    )
    root = tmp_path / "snapshots"
    for wait in (0.3, 1.1):
        process = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    world = stub(tmp_path)
    before = len(world.history())
    assert world.step(seed=2).step == before
    assert world.store.verify("trial") == []
    undisturbed = stub(tmp_path / "b")
    assert [s.id for s in undisturbed.evolve(before + 1, seed=2)] == [s.id for s in world.history()]

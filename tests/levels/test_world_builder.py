"""World built piece by piece: stages, cycles of one's own, state schema, storage, content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wg_core import Block, Graph, Port, Stage, State, World
from wg_core.assembly.models import CANONICAL as ROLES
from wg_core.errors import ConfigError, NodeError, UnexpectedInputError, ValidationError
from wg_core.state.content import WorldContent, apply
from wg_core.state.state import StateSchema
from wg_core.state.store import SnapshotStore


class Say(Block):
    """Gives its text as an intent, and what was done to the world with it."""

    ports = (Port("action", "in", "text", optional=True), Port("intent", "out", "dict"))

    def __init__(self, *, text: str = "Rain.") -> None:
        super().__init__()
        self.text = text

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"intent": {"text": f"{self.text} {inputs.get('action', '')}".strip()}}


class Plan(Block):
    """Gives one fixed request."""

    ports = (Port("intent", "in", "dict"), Port("generation_config", "out", "dict"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"generation_config": {"requests": [{"id": "r1", "slot": "texts", "maker": "note", "params": {}}]}}


def lone(block: Block, id: str, **more: Any) -> Stage:
    """A stage of one graph of one block."""
    graph = Graph(f"{id}_graph")
    graph.add_node(block, "say")
    stage = Stage(id, **more)
    stage.add_pipeline(graph)
    return stage


def small(tmp_path: Path) -> World:
    """Weather gives an intent, Planner a request; nothing else."""
    world = World("small")
    world.set_storage(tmp_path / "snapshots")
    world.add_stage(lone(Say(), "weather", writes=["intent"]))
    world.add_stage(lone(Plan(), "planner", reads=["intent"], writes=["generation_config"]))
    world.set_cycle(["weather", "planner", "world_update"])
    return world


def test_a_world_from_nothing_with_a_cycle_of_its_own(tmp_path: Path) -> None:
    """03 W-15: an empty world takes stages, a cycle and a store, validates and steps; W-11 does not bind it."""
    world = small(tmp_path)
    assert world.validate(deep=True).is_valid
    first = world.step(seed=1, action="a storm lands")
    assert [r.role for r in first.stages] == ["weather", "planner", "world_update"]
    assert first.carried["intent"]["text"] == "Rain. a storm lands"
    assert State.of(first.carried).filled() == {1, 2}
    assert "the state is dropped: intent, generation_config" in first.stages[-1].reason
    second = world.step(seed=1)
    assert second.carried["intent"]["text"] == "Rain."  # the state was replaced after World update, so both ran again
    assert all(r.ran for r in second.stages[:2])
    assert world.verify() == []


def test_next_stage_and_cycles(tmp_path: Path) -> None:
    """03 W-15: next_stage goes round; a cycle is a permutation that contains every stage once."""
    world = small(tmp_path)
    assert [world.next_stage(n) for n in world.cycle] == ["planner", "world_update", "weather"]
    with pytest.raises(NodeError, match="did you mean 'weather'"):
        world.next_stage("wether")
    for cycle, said in (
        (["weather", "planner", "weather"], "2 times"),
        (["weather"], "planner is missing"),
        (["weather", "planer"], "did you mean 'planner'"),
    ):
        with pytest.raises(ConfigError, match=said):
            world.set_cycle(cycle)
    assert world.cycle == ("weather", "planner", "world_update")


def test_what_a_world_lacks_is_said(tmp_path: Path) -> None:
    """03 W-15: an empty world exists, and says what is missing before anything is written."""
    world = World("empty", store=SnapshotStore(tmp_path / "s"))
    assert world.cycle == ROLES
    issues = world.validate(strict=False).errors
    assert [i.code for i in issues] == ["STAGE_MISSING"] and "philosopher" in issues[0].message
    with pytest.raises(ValidationError, match="lacks the stages"):
        world.validate()
    with pytest.raises(ConfigError, match="lacks the stages"):
        world.step()
    assert not (tmp_path / "s").exists()
    world.add_stage(lone(Say(), "weather", writes=["intent"]))
    assert {i.code for i in world.validate(strict=False).errors} == {"STAGE_MISSING", "STAGE_IDLE"}
    with pytest.raises(NodeError, match="has a stage 'weather' already"):
        world.add_stage(lone(Say(), "weather", writes=["intent"]))
    with pytest.raises(NodeError, match="built in"):
        world.add_stage(lone(Say(), "x", writes=["intent"]), "world_update")


def test_a_cycle_without_world_update_warns(tmp_path: Path) -> None:
    world = small(tmp_path)
    world.set_cycle(["weather", "planner"])
    assert [i.code for i in world.validate().warnings] == ["NO_UPDATE"]
    world.step(seed=1)
    second = world.step(seed=1)
    assert [r.reason for r in second.stages] == [
        "block 1 (intent) is already filled",
        "block 2 (generation_config) is already filled",
    ]


def test_a_given_state_that_a_cycle_throws_away_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """03 W-10, W-15: a cycle that begins after World update begins with an empty state."""
    world = World.from_template("stub", world_id="turned")
    world.store = SnapshotStore(tmp_path)
    world.set_cycle([*ROLES[3:], *ROLES[:3]])
    world.step(seed=1)
    assert caplog.text == ""
    world.step(seed=1, state=world.example_state([1, 2]))
    assert "its cycle begins with an empty state; what was given is lost: intent, generation_config" in caplog.text


def test_an_option_that_no_run_has_is_refused(tmp_path: Path) -> None:
    """02 G-27: by name at the world too, and the world can be stepped afterwards."""
    world = World.from_template("stub", world_id="asked")
    world.store = SnapshotStore(tmp_path)
    with pytest.raises(UnexpectedInputError, match="unexpected keyword argument 'sed'; options are training"):
        world.step(sed=1)
    assert world.step(seed=1).step == 0


def test_a_stage_that_breaks_the_canonical_contract_is_an_error(tmp_path: Path) -> None:
    """03 W-11, W-15: what a canonical cycle forbids, a cycle of one's own may do."""
    source = World.from_template("stub", world_id="trial")
    source.stages["development"].reads = ("outcome",)
    assert "CONTRACT" in {i.code for i in source.validate(strict=False).errors}
    source.set_cycle(ROLES)
    assert source.validate(deep=True).is_valid
    source.set_canonical_cycle()
    assert not source.validate(strict=False).is_valid


def test_cycles_in_files_round_trip(tmp_path: Path) -> None:
    """03 W-15, W-17: `cycle: [ids]` is read, written and hashed; equal seeds give equal histories."""
    config = World.from_template("stub", world_id="trial").to_config()
    turned = [*ROLES[3:], *ROLES[:3]]
    config["execution"]["cycle"] = turned
    world = World.from_config(json.loads(json.dumps(config)))
    assert world.cycle == tuple(turned) and not world.canonical
    assert World.from_config(world.to_config()).to_config() == world.to_config()
    assert world.config_hash != World.from_template("stub", world_id="trial").config_hash
    world.set_storage(tmp_path / "a")
    assert [all(r.ran for r in s.stages) for s in world.evolve(2, seed=3)] == [True, True]
    assert world.content().chronicle_length == 2
    config["execution"]["cycle"] = turned[1:]
    with pytest.raises(ConfigError, match=r"execution.cycle: cycle: development is missing"):
        World.from_config(config)


def test_a_file_may_name_stages_of_its_own(tmp_path: Path) -> None:
    """A cycle of one's own has stages of any name; the canonical one has not."""
    config = World.from_template("stub", world_id="trial").to_config()
    stages = config["execution"]["stages"]
    stages["dreamer"] = {**stages.pop("development"), "role": "development"}
    with pytest.raises(ConfigError, match="the canonical cycle has no stage 'dreamer'"):
        World.from_config(config)
    config["execution"]["cycle"] = [r if r != "development" else "dreamer" for r in ROLES]
    world = World.from_config(config)
    world.set_storage(tmp_path / "s")
    assert [r.role for r in world.step(seed=1).stages if r.ran] == ["dreamer", "architect", "creator"]
    assert World.from_config(world.to_config()).to_config() == world.to_config()


def test_a_world_may_extend_the_state(tmp_path: Path) -> None:
    """03 W-2: a declared field is asked of the model, kept in the state, checked; others stay refused."""
    config = World.from_template("stub", world_id="trial").to_config()
    config["execution"]["state_schema"] = {"intent": {"mood": {"type": "string", "enum": ["calm", "grim"]}}}
    world = World.from_config(config)
    world.set_storage(tmp_path / "s")
    snapshot = world.step(seed=1)
    assert snapshot.carried["intent"]["mood"] in ("calm", "grim")
    assert world.step(seed=1).applied["intent"]["mood"] == snapshot.carried["intent"]["mood"]  # type: ignore[index]
    with pytest.raises(ConfigError, match="mood"):
        world.step(state={"intent": {"text": "x", "mood": "wild"}})
    again = World.from_config(world.to_config())
    assert again.state_schema == world.state_schema == StateSchema(config["execution"]["state_schema"])
    config["execution"]["state_schema"] = {"intent": {"text": {"type": "string"}}}
    with pytest.raises(ConfigError, match=r"execution.state_schema: .*has this field already"):
        World.from_config(config)


def test_initial_content_and_storage(tmp_path: Path) -> None:
    """03 W-15, W-25: content set in code seeds step 0; where snapshots lie does not change what the world is."""
    world = World.from_template("stub", world_id="trial")
    before = world.config_hash
    world.set_initial_content({"style": "Ornate.", "characters": ["Mara"]})
    world.set_storage(tmp_path / "here")
    assert world.config_hash == before
    world.step(seed=1)
    assert world.content().style == "Ornate." and world.content().ids("entity") == ["mara"]
    assert World.from_config(world.to_config()).store.root == (tmp_path / "here").resolve()
    with pytest.raises(ConfigError, match=r"content\.sytle"):
        world.set_initial_content({"sytle": "x"})
    assert world.initial_content.style == "Ornate."


def test_content_is_a_fold_of_the_applied_states(tmp_path: Path) -> None:
    """03 C-1, C-2: folding the states of the history over the first content gives the very same content, with whys."""
    world = World.from_template("stub", world_id="trial", seed=4)
    world.set_storage(tmp_path / "s")
    history = list(world.evolve(4))
    content = WorldContent.from_seed(world.to_config()["content"])
    for snapshot in history:
        if snapshot.applied is not None:
            content = apply(
                content, State.of(snapshot.applied), step=snapshot.step, made_by=f"{world.world_id}/world_update"
            )
    assert content.save(world.store.blobs) == history[-1].content
    changed = content.chronicle(-1)[0]["changes"][0]
    why = content.why(changed["kind"], changed["id"], next(iter(changed["fields"])))
    assert why == {"step": 3, "made_by": "trial/world_update"}


def test_due_says_which_stages_run_next(tmp_path: Path) -> None:
    """03 W-13: the forecast of stages agrees with what then runs."""
    world = World.from_template("stub", world_id="trial", seed=4)
    world.set_storage(tmp_path / "s")
    for _ in range(2):
        due = world.due()
        assert {r.role: r.ran for r in world.step().stages} == due
    for blocks in ((), (1,), (1, 2), (1, 2, 3, 4, 5)):
        state = world.example_state(blocks)
        due = world.due(state)
        if 3 in blocks and 4 not in blocks:
            continue
        assert {r.role: r.ran for r in world.step(state=state).stages} == due


def test_save_and_load_keep_the_whole_world(tmp_path: Path) -> None:
    """03 W-18: a saved folder builds an equal world, with cycle, state schema and content, that steps alike."""
    config = World.from_template("stub", world_id="trial", seed=4).to_config()
    config["execution"]["cycle"] = [*ROLES[3:], *ROLES[:3]]
    config["execution"]["state_schema"] = {"intent": {"mood": {"type": "string", "enum": ["calm", "grim"]}}}
    world = World.from_config(config)
    again = World.load(world.save(tmp_path / "saved"))
    assert again.to_config() == world.to_config() and again.config_hash == world.config_hash
    world.set_storage(tmp_path / "a")
    again.set_storage(tmp_path / "b")
    assert [s.id for s in again.evolve(2)] == [s.id for s in world.evolve(2)]
    assert again.load_last_snapshot().id == world.history()[-1].id  # type: ignore[union-attr]

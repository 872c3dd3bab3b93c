"""Stage: its contract over the state, its mapping, its condition."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from wg_core import Block, Graph, Port, Stage, State, World
from wg_core.errors import ConfigError, OutputContractError, PortValueError, ValidationError
from wg_core.execution.context import Event, current_context
from wg_core.state.store import SnapshotStore


class Decide(Block):
    """Gives an intent, or what it was made with, and says that it asked a model."""

    ports = (Port("seen", "in", optional=True), Port("intent", "out", "dict"))

    def __init__(self, *, gives: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.gives = {"text": "Rain."} if gives is None else gives

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        current_context().add_usage("m", prompt_tokens=3, completion_tokens=2)
        return {"intent": self.gives}


def deciding(block: Block | None = None, **more: Any) -> Stage:
    graph = Graph("g")
    graph.add_node(block or Decide(), "say")
    stage = Stage("decide", **{"writes": ["intent"], **more})
    stage.add_pipeline(graph)
    return stage


def test_a_stage_that_leaves_its_block_empty_fails() -> None:
    """03 W-7: it ran, so the block is filled; a stage that does not run hands the very state on, with the reason."""
    with pytest.raises(OutputContractError, match="ran but left intent empty"):
        deciding(Decide(gives={"text": " "})).step(State())
    given = State.of({"intent": {"text": "Snow."}})
    result = deciding().step(given)
    assert result.state is given and (result.ran, result.reason) == (False, "block 1 (intent) is already filled")


def test_the_events_of_a_stage_are_part_of_its_result_where_they_are_asked_for() -> None:
    """03 W-7."""
    result = deciding().step(State(), events=True)
    assert next((e.kind, e.path) for e in result.events if e.kind == "node_end") == ("node_end", "decide/g/g/say")
    assert list(deciding().step(State()).events) == []


def test_what_models_used_is_part_of_the_result_also_outside_any_world() -> None:
    """03 W-7: the same with options and without; a ledger that is given gets it too, and what it held does not count."""
    used = {"m": {"calls": 1, "prompt_tokens": 3, "completion_tokens": 2}}
    ledger: dict[str, dict[str, float]] = {}
    for options in ({}, {"seed": 1}, {"usage": ledger}, {"usage": ledger}):
        assert deciding().step(State(), **options).usage == used
    assert ledger == {"m": {"calls": 2, "prompt_tokens": 6, "completion_tokens": 4}}


def test_equal_names_are_mapped_and_the_rest_is_asked_for() -> None:
    """03 W-5, W-9: a name that no block, pipeline or field has is refused where the stage is built."""
    stage = deciding(inputs={"seen": "world"})
    assert (stage.input_mapping(), stage.output_mapping()) == ({"seen": "world"}, {"intent": "intent"})
    for mapping, said in (
        ({"inputs": {"sen": "world"}}, "which no pipeline takes; did you mean 'seen'"),
        ({"inputs": {"seen": "outcome"}}, "comes from 'outcome'"),
        ({"outputs": {"intent": "intend"}}, "did you mean 'intent'"),
        ({"outputs": {"outcome": "intent"}}, "outputs fills 'outcome'"),
        ({"reads": ["intents"]}, "no block 'intents'.*did you mean 'intent'"),
        ({"writes": ["artefacts"]}, "no block 'artefacts'.*did you mean 'artifacts'"),
    ):
        with pytest.raises(ConfigError, match=said):
            wrong = deciding(**mapping)
            wrong.input_mapping()
            wrong.output_mapping()


def test_two_pipelines_that_fill_one_block_are_told_apart_by_name() -> None:
    """03 W-5: where two pipelines offer the name of a block nothing is guessed."""
    stage = Stage("decide", writes=["intent"])
    for name in ("one", "two"):
        graph = Graph("g")
        graph.add_node(Decide(), "say")
        stage.add_pipeline(graph, name)
    with pytest.raises(ConfigError, match=r"no pipeline output has this name.*'one:intent'"):
        stage.output_mapping()


class Counts(Decide):
    """Takes a number, and gives a text too."""

    ports = (Port("seen", "in", "number", optional=True), Port("intent", "out", "dict"), Port("said", "out", "text"))


@pytest.mark.parametrize(
    ("mapping", "code", "says"),
    [
        ({"outputs": {"intent": "intnt"}}, "MAPPING", "output 'intent' comes from 'intnt'; did you mean 'intent'"),
        ({"inputs": {"sean": "world"}}, "MAPPING", "inputs maps 'sean', which no pipeline takes; did you mean 'seen'"),
        ({"outputs": {"intent": "intent", "intent.text": "intent"}}, "MAPPING", "'intent' as a whole and 'intent.text' within it"),
        ({"inputs": {"seen": "action"}}, "TYPE_MISMATCH", "'seen' is mapped to 'action', but 'number' is taken and 'text' given"),
        ({"outputs": {"intent": "said"}}, "TYPE_MISMATCH", "'said' is mapped to 'intent', but 'dict' is taken and 'text' given"),
    ],
)  # fmt: skip
def test_a_wrong_mapping_is_found_by_validation(mapping: dict[str, Any], code: str, says: str) -> None:
    """03 W-5, W-9: names exist, types agree, and nothing is filled twice; also of a stage that stands alone."""
    issues = deciding(Counts(), **mapping).validate(strict=False).errors
    assert [i.code for i in issues] == [code] and says in str(issues[0])


@pytest.mark.parametrize("state", [[1], {"intnt": {}}, {"intent": {"text": 5}}])
def test_a_value_that_is_no_state_is_refused(state: Any) -> None:
    """02 G-28, M-3: as the value of a port, so that a server answers that the inputs are bad."""
    with pytest.raises(PortValueError, match="state"):
        deciding().run({"state": state})


def test_a_dry_run_through_the_common_contract() -> None:
    """02 G-41: the same keys, and no placeholder in the state."""
    stage = deciding()
    state = State.of({2: {"requests": []}})
    assert stage.run({"state": state}, dry_run=True) == asyncio.run(stage.run_async({"state": state}, dry_run=True)) == {"state": state}
    assert stage.step(State(), dry_run=True).ran and not stage.step(State.of({1: {"text": "Snow."}}), dry_run=True).ran


def test_the_mapping_follows_a_change_of_the_stage() -> None:
    """03 W-5: it is found once for many steps, and again after a pipeline was added."""
    stage = deciding()
    assert stage.step(State()).ran and stage.step(State()).ran
    graph = Graph("g")
    graph.add_node(Decide(), "say")
    stage.add_pipeline(graph, "two")
    with pytest.raises(ConfigError, match="no pipeline output has this name"):
        stage.step(State())


def test_pipelines_form_no_cycle() -> None:
    """03 W-9: a stage is a DAG, and what leads nowhere is told."""
    stage = deciding()
    stage.add_pipeline(stage.nodes["g"].child, "again")
    stage.add_edge("g", "intent", "again", "seen")
    stage.add_edge("again", "intent", "g", "seen")
    found = {issue.code: issue.path for issue in stage.validate(strict=False).issues}
    assert found["CYCLE_FORBIDDEN"] == "decide" and found["DEAD_END"] == "decide/again"


@pytest.mark.parametrize(
    ("condition", "state", "reason"),
    [
        ({"filled": ["artifacts.images"]}, {3: {"audios": [{"id": "ab" * 32, "media_type": "audio/wav"}]}},
         "execution_condition: artifacts.images is empty"),
        ({"filled": ["artifacts.images"]}, {3: {"images": [{"id": "ab" * 32, "media_type": "image/png"}]}}, ""),
        ({"empty": ["outcome"]}, {5: {"narrative": "It rained."}}, "execution_condition: outcome is filled"),
        ({"empty": ["outcome"]}, {}, ""),
        ({"filled": ["intent"]}, {1: {"text": "Snow."}}, "block 1 (intent) is already filled"),
    ],
)  # fmt: skip
def test_a_condition_only_narrows(condition: dict[str, list[str]], state: dict[int, Any], reason: str) -> None:
    """03 W-5, W-6: what the contract refuses a condition cannot allow; it is kept in config and counts in the hash."""
    stage = deciding(execution_condition=condition)
    result = stage.step(State.of(state))
    assert (result.reason, result.ran) == (reason, not reason)
    assert (stage.run({"state": State.of(state)})["state"].filled() == State.of(state).filled()) is bool(reason)


def test_a_condition_lives_in_the_file_and_is_checked(tmp_path: Path) -> None:
    """03 W-6, W-9: an unknown block or field is refused before anything runs."""
    config = World.from_template("stub", world_id="narrow").to_config()
    config["execution"]["stages"]["creator"]["execution_condition"] = {"empty": ["intent.focus"]}
    world = World.from_config(config)
    world.store = SnapshotStore(tmp_path)
    assert World.from_config(world.to_config()).config_hash == world.config_hash
    assert world.config_hash != World.from_template("stub", world_id="narrow").config_hash
    world.dry_run()
    for condition, said in (
        ({"filed": ["intent"]}, "unknown key 'filed'"),
        ({"filled": ["artefacts"]}, "no block 'artefacts'"),
    ):
        config["execution"]["stages"]["creator"]["execution_condition"] = condition
        with pytest.raises(ConfigError, match=said):
            World.from_config(config)
    config["execution"]["stages"]["creator"]["execution_condition"] = {"empty": ["intent.focsu"]}
    with pytest.raises(ValidationError, match="no field 'focsu'; did you mean 'focus'"):
        World.from_config(config).validate()


def test_hooks_see_the_state_before_and_after_a_stage(tmp_path: Path) -> None:
    """03 W-16: each stage of a step, run or not, with both states; then the snapshot."""
    world = World.from_template("stub", world_id="seen")
    world.store = SnapshotStore(tmp_path)
    told: list[Event] = []
    snapshot = world.step(state=world.example_state([1, 2, 3]), hooks=[told.append])
    starts = [e for e in told if e.kind == "stage_start" and e.level == "world"]
    ends = [e for e in told if e.kind == "stage_end" and e.level == "world"]
    assert [e.node_id for e in starts] == [e.node_id for e in ends] == list(world.cycle)
    state = snapshot.given
    for start, end in zip(starts, ends, strict=True):
        assert start.inputs and end.inputs and end.outputs
        assert start.inputs == end.inputs
        assert start.inputs["state"] == (state if start.node_id != "development" else {})
        state = end.outputs["state"]
    assert state == snapshot.carried and told[-1].kind == "snapshot" and told[-1].data["id"] == snapshot.id

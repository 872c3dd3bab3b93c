"""One suite over everything that runs: graph, pipeline, stage, world, and the proxies of what runs elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "remote"))

from far import Far, far_registry

from wg_core import ConfigError, Graph, ModelPool, Pipeline, Stage, State, World
from wg_core.assembly.contract import contract_hash, contract_of, contract_words
from wg_core.errors import CheckpointError, MissingInputError, UnexpectedInputError
from wg_core.execution.block import Block
from wg_core.execution.plan import Plan
from wg_core.levels.remote import Remote
from wg_core.levels.remote_stage import RemoteStage
from wg_core.state.store import SnapshotStore

GRAPH: dict[str, Any] = {
    "kind": "graph",
    "id": "g",
    "nodes": [{"node_id": "a", "block_type": "far/same"}, {"node_id": "b", "block_type": "far/same"}],
    "edges": [{"source_node": "a", "source_port": "y", "target_node": "b", "target_port": "x"}],
    "exposed_inputs": [{"name": "x", "node_id": "a", "port_name": "x"}],
    "exposed_outputs": [{"name": "narrative", "node_id": "b", "port_name": "y"}],
}
STAGE: dict[str, Any] = {
    "kind": "stage", "id": "s", "reads": ["intent"], "writes": ["outcome"], "inputs": {"x": "intent.text"},
    "outputs": {"outcome.narrative": "narrative"}, "graph": GRAPH,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A level, what it is given, and how its class builds it again."""

    level: Any
    inputs: dict[str, Any]
    text: Callable[[dict[str, Any]], Any]

    def again(self, config: dict[str, Any]) -> Any:
        return type(self.level).from_config(config, registry=far_registry(), pool=ModelPool())


def make(cls: type[Any], config: dict[str, Any]) -> Any:
    return cls.from_config(config, registry=far_registry(), pool=ModelPool())


PLAIN = {"inputs": {"x": "calm"}, "text": lambda out: out["narrative"]}
STATED = {
    "inputs": {"state": State.of({"intent": {"text": "calm"}})},
    "text": lambda out: out["state"].read("outcome.narrative"),
}
KINDS = ("graph", "pipeline", "stage", "remote graph", "remote pipeline", "remote stage", "mixed pipeline")
REMOTE = tuple(kind for kind in KINDS if kind.startswith("remote"))


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Case]]:
    pipeline = {"kind": "pipeline", "id": "p", "nodes": [{"node_id": "g", "config": GRAPH}]}
    stage = make(Stage, STAGE)
    with Far(GRAPH) as graphs, Far({**pipeline, "id": "g"}) as pipelines, Far(STAGE) as stages:
        mixed = {"kind": "pipeline", "id": "p", "nodes": [{"node_id": "g", **graphs.entry()}]}
        yield {
            "graph": Case(make(Graph, GRAPH), **PLAIN),
            "pipeline": Case(make(Pipeline, pipeline), **PLAIN),
            "stage": Case(stage, **STATED),
            "remote graph": Case(make(Remote, {"id": "g", **graphs.entry()}), **PLAIN),
            "remote pipeline": Case(make(Remote, {"id": "p", **pipelines.entry()}), **PLAIN),
            "remote stage": Case(
                make(RemoteStage, {"id": "s", "reads": ["intent"], "writes": ["outcome"], **stages.entry()}), **STATED
            ),
            "mixed pipeline": Case(make(Pipeline, mixed), **PLAIN),
        }


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def test_it_runs_to_the_same_end(case: Case) -> None:
    """proves 02 G-1, G-3, acceptance 3: whoever calls need not know what it is."""
    given = dict(case.inputs)
    result = case.level.run(given)
    assert case.text(result) == "calm"
    assert set(result) == {entry["key"] for entry in case.level.get_output_spec()}
    assert given == case.inputs


def test_its_contract_says_everything(case: Case) -> None:
    """proves 02 G-22, G-23: equal for equal ports, wherever they are; and it can be stored."""
    for entry in (*case.level.get_input_spec(), *case.level.get_output_spec()):
        assert {"key", "types", "required", "optional", "bindings", "aggregation", "streamable", "schema"} <= set(entry)
    words = contract_words(contract_of(case.level))
    assert contract_hash(type(contract_of(case.level)).model_validate(words)) == case.level.contract_hash()


def test_there_and_here_have_one_contract(cases: dict[str, Case]) -> None:
    for kind in ("graph", "pipeline", "stage"):
        assert cases[kind].level.contract_hash() == cases[f"remote {kind}"].level.contract_hash()
    assert cases["graph"].level.config_hash == cases["remote graph"].level.config_hash
    assert cases["stage"].level.config_hash == cases["remote stage"].level.config_hash
    assert cases["pipeline"].level.config_hash == cases["mixed pipeline"].level.config_hash


def test_it_is_written_down_and_built_again(case: Case, tmp_path: Path) -> None:
    """proves 02 G-51, S-15."""
    config = case.level.to_config()
    again = case.again(config)
    assert type(again) is type(case.level)
    assert again.to_config() == config and again.config_hash == case.level.config_hash
    path = case.level.save_config(tmp_path / "level.yaml")
    read = type(case.level).from_yaml(path, registry=far_registry(), pool=ModelPool())
    assert read.to_config() == config
    assert case.text(read.run(case.inputs)) == "calm"


def test_a_key_that_nobody_knows_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="edgess"):
        case.again({**case.level.to_config(), "edgess": []})


def test_validation_plan_and_dry_run(case: Case) -> None:
    """proves 02 G-24, G-30, G-41: the same keys, and nothing is computed or called."""
    assert case.level.validate(deep=True).is_valid
    plan = case.level.plan()
    assert isinstance(plan, Plan) and case.level.plan() is plan
    expected = (
        {"outcome.narrative"} if type(case.level) is Stage else {"outcome"} if "state" in case.inputs else {"narrative"}
    )
    assert set(case.level.dry_run()) == expected
    assert case.level.describe().startswith(f"{case.level.level} {case.level.id}")


def test_wrong_inputs_and_options(case: Case) -> None:
    with pytest.raises(UnexpectedInputError, match="num_steps"):
        case.level.run(case.inputs, num_steps=3)
    if "state" not in case.inputs:
        with pytest.raises(UnexpectedInputError, match="no input 'xx'"):
            case.level.run({"xx": 1, **case.inputs})
        with pytest.raises(MissingInputError, match="needs 'x'"):
            case.level.run({})


def test_the_doors_of_state_and_training(case: Case, tmp_path: Path) -> None:
    """proves 02 G-1, M-6: a remote one has no parameters and no state."""
    level = case.level
    assert level.state_dict() == {} and level.trainable_parameters() == []
    assert level.load_state_dict({}).missing == ()
    assert level.to("cpu") is level
    assert all(isinstance(block, Block) for block in level.iter_blocks())
    level.save_checkpoint(tmp_path / "checkpoint")
    level.load_from_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError):
        level.save(tmp_path / "level", format="tape")


def test_what_runs_elsewhere_is_listed(cases: dict[str, Case]) -> None:
    for kind, case in cases.items():
        assert len(list(case.level.remotes())) == (1 if kind in REMOTE or kind.startswith("mixed") else 0)
        assert bool(list(case.level.iter_blocks())) is (kind in ("graph", "pipeline", "stage"))


def test_hooks_see_it_begin_and_end(case: Case) -> None:
    """proves 02 G-45: paths are the same, whether the inside is seen or not."""
    told: list[tuple[str, str]] = []
    case.level.run(case.inputs, callbacks=[lambda e: told.append((e.kind, e.path))])
    ends = [t for t in told if t[1] == case.level.id]
    assert ends == [("run_start", case.level.id), ("run_end", case.level.id)]
    own: list[str] = []
    case.level.hooks.append(lambda e: own.append(e.path))
    case.level.run(case.inputs)
    case.level.hooks.clear()
    assert own == [path for _, path in told]


def test_it_can_stand_in_a_pipeline_or_a_stage(cases: dict[str, Case]) -> None:
    """proves 02 G-1, P-3: a child is a child."""
    for kind in ("graph", "remote graph"):
        parent = Pipeline("parent")
        parent.add_graph(cases[kind].level, "child")
        assert parent.run({"x": "calm"}) == {"narrative": "calm"}
    for kind in ("pipeline", "remote pipeline", "mixed pipeline"):
        stage = Stage(
            "st",
            reads=["intent"],
            writes=["outcome"],
            inputs={"x": "intent.text"},
            outputs={"outcome.narrative": "narrative"},
        )
        stage.add_pipeline(cases[kind].level, "child")
        assert STATED["text"](stage.run(STATED["inputs"])) == "calm"


def test_it_can_be_awaited(case: Case) -> None:
    """proves 02 G-1: the other drivers take it too."""
    import asyncio

    if "state" not in case.inputs:
        assert asyncio.run(case.level.run_async(case.inputs)) == {"narrative": "calm"}


def test_a_world_keeps_the_same_promises(tmp_path: Path) -> None:
    """proves 02 acceptance 3 where a world has it: config, hash, validation by dry run, blocks, checkpoints."""
    world = World.from_template("stub", world_id="isle", seed=1)
    world.store = SnapshotStore(tmp_path / "store")
    config = world.to_config()
    again = World.from_config(config)
    assert again.to_config() == config and again.config_hash == world.config_hash
    assert World.from_yaml(world.save_config(tmp_path / "w.yaml")).config_hash == world.config_hash
    assert world.dry_run().keys() == world.stages.keys()
    assert all(isinstance(block, Block) for block in world.iter_blocks())
    world.save_checkpoint(tmp_path / "checkpoint")
    world.load_from_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="edgess"):
        World.from_config({**config, "edgess": []})
    assert world.step().step == 0

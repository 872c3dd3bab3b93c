"""What every level keeps, checked once for all of them: graph, pipeline and stage are called alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from blocks_for_tests import new_registry

from wg_core import ConfigError, Graph, ModelPool, Pipeline, Stage, State
from wg_core.errors import NodeError, StateDictError, UnexpectedInputError
from wg_core.execution.context import Event
from wg_core.execution.executable_graph import ExecutableGraph
from wg_core.execution.plan import Plan
from wg_core.levels.level import Level

Any_ = Level[Any]
INTENT = {"text": "calm"}


def graph() -> Graph:
    made = Graph("g")
    made.add_node("test/echo", "a", registry=new_registry())
    made.add_node("test/echo", "b", registry=new_registry())
    made.add_edge("a", "y", "b", "x")
    made.expose_input("a", "x", "x")
    made.expose_output("b", "y", "intent")
    return made


def pipeline() -> Pipeline:
    return Pipeline.from_graph(graph())


def stage() -> Stage:
    made = Stage("s", reads=["intent"], writes=["outcome"], inputs={"x": "intent.text"}, outputs={"outcome.narrative": "intent"})
    made.add_pipeline(pipeline())
    return made


def level_input(level: Any_) -> dict[str, Any]:
    return {"state": State.of({"intent": INTENT})} if isinstance(level, Stage) else {"x": "calm"}


LEVELS: dict[str, Callable[[], Any_]] = {"graph": graph, "pipeline": pipeline, "stage": stage}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Any_:
    return LEVELS[request.param]()


def test_it_runs_and_its_results_are_its_output_spec(level: Any_) -> None:
    """02 G-1, G-38, acceptance 3: exactly the declared keys."""
    result = level.run(level_input(level))
    assert set(result) == {e["key"] for e in level.get_output_spec()}
    value = result.get("intent") or result["state"].read("outcome.narrative")
    assert value == "calm"


def test_its_spec_is_plain_and_complete(level: Any_) -> None:
    """02 G-22, 01 F-55."""
    for entry in (*level.get_input_spec(), *level.get_output_spec()):
        assert {"key", "types", "required", "optional", "bindings", "aggregation", "streamable", "schema"} <= set(entry)
        assert entry["required"] is not entry["optional"]


def test_it_is_written_down_and_built_again(level: Any_, tmp_path: Any) -> None:
    """01 A-15, 02 G-51: equal config, equal results, through text and file too."""
    config = level.to_config()
    build = {"registry": new_registry(), "pool": ModelPool()}
    again = type(level).from_config(config, **build)
    assert again.to_config() == config
    assert again.run(level_input(again)).keys() == level.run(level_input(level)).keys()
    path = level.save_config(tmp_path / "level.yaml")
    assert type(level).from_yaml(path, **build).to_config() == config
    assert type(level).from_yaml_text(path.read_text(), **build).to_config() == config


def test_unknown_keys_in_its_file_are_refused(level: Any_) -> None:
    """02 G-51."""
    with pytest.raises(ConfigError, match="unknown key 'edgess'; did you mean 'edges'"):
        type(level).from_config({**level.to_config(), "edgess": []}, registry=new_registry())


def test_validation_and_plan(level: Any_) -> None:
    """02 G-1, G-24, G-30."""
    assert level.validate(deep=True).is_valid
    plan = level.plan()
    assert isinstance(plan, Plan)
    assert level.plan() is plan
    assert level.describe().startswith(f"{level.level} {level.id}")


def test_a_dry_run_has_the_same_order_and_computes_nothing(level: Any_) -> None:
    """02 G-41."""
    dry: list[Event] = []
    real: list[Event] = []
    level.dry_run(callbacks=[dry.append])
    level.run(level_input(level), callbacks=[real.append])
    told = [[(e.kind, e.path) for e in events] for events in (dry, real)]
    assert told[0] == told[1]
    assert ("node_end", told[0][0][1] + "/" + next(iter(level.nodes))) in told[0]


def test_hooks_of_the_instance_see_everything_below(level: Any_) -> None:
    """02 G-45, G-46."""
    paths: list[str] = []
    level.hooks.append(lambda e: paths.append(e.path) if e.kind == "node_start" else None)
    level.run(level_input(level))
    assert paths[0].startswith(f"{level.id}/")
    assert paths[-1].endswith("/b")


def test_options_are_checked(level: Any_) -> None:
    """02 G-27."""
    with pytest.raises(UnexpectedInputError, match="'num_steps'"):
        level.run(level_input(level), num_steps=1)


def test_structure_calls_are_the_same_and_atomic(level: Any_) -> None:
    """02 G-2, 01 F-53."""
    before = (level.version, dict(level.nodes), level.edges)
    name = next(iter(level.nodes))
    with pytest.raises(NodeError, match=f"node id {name!r} is taken"):
        level.insert_node(level.nodes[name].child, name)
    with pytest.raises(ConfigError, match="bad node id"):
        level.insert_node(level.nodes[name].child, "a b")
    with pytest.raises(NodeError, match="has no node 'nobody'"):
        level.remove_node("nobody")
    assert (level.version, dict(level.nodes), level.edges) == before
    level.rename_node(name, "renamed")
    level.run(level_input(level))


def test_an_empty_one_says_so(level: Any_) -> None:
    """02 G-26 EMPTY."""
    for name in list(level.nodes):
        level.remove_node(name)
    result = level.validate(strict=False)
    assert [i.code for i in result.errors] == ["EMPTY"]
    assert f"this {level.level} has no nodes" in str(result)


def test_state_and_training_doors(level: Any_) -> None:
    """02 G-1."""
    assert level.state_dict() == {}
    assert level.trainable_parameters() == []
    assert len(list(level.iter_blocks())) == 2
    with pytest.raises(StateDictError, match=r"unexpected \['z:z'\]"):
        level.load_state_dict({"z:z": 1})
    level.set_trainable(next(iter(level.nodes)), False)
    assert level.to("cpu") is level


def test_the_machine_is_written_once() -> None:
    """02 G-3: no level has its own sort, buffer, exposure code or loop; the container has them all."""
    for cls in (Graph, Pipeline, Stage):
        assert issubclass(cls, ExecutableGraph)
        for name in ("_execute", "_session", "_bind", "plan", "describe", "run_async", "run_batch", "stream", "steps"):
            assert getattr(cls, name) is getattr(ExecutableGraph, name)
    assert {cls.level for cls in (Graph, Pipeline, Stage)} == set(LEVELS)


def test_a_copy_is_the_same_and_goes_its_own_way(level: Any_) -> None:
    """01 E-6: equal structure over the same blocks; neither follows the other."""
    level.metadata["a"] = 1
    made = level.copy()
    assert type(made) is type(level) and made.to_config() == level.to_config() and made.config_hash == level.config_hash
    assert [id(b) for b in made.iter_blocks()] == [id(b) for b in level.iter_blocks()]
    assert str(made.run(level_input(made))) == str(level.run(level_input(level)))
    before = level.to_config()
    made.metadata["a"] = 2
    name = next(iter(made.nodes))
    made.set_trainable(name, False)
    made.rename_node(name, "renamed")
    below = made.nodes["renamed"].child
    if isinstance(below, Level):
        below.metadata["deep"] = True
        below.remove_node(next(iter(below.nodes)))
    else:
        made.add_node("test/echo", "more", registry=new_registry())
        made.remove_node("renamed")
    assert level.to_config() == before and made.to_config() != before
    assert level.run(level_input(level))

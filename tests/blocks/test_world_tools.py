"""Tools that look into a world, and a stage that is an agent with them; they read and change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wg_core import EndWorld, Stage, State, World, WorldContent
from wg_core.assembly.registry import default_registry
from wg_core.errors import ConfigError, ToolError
from wg_core.execution.context import Event
from wg_core.state.store import SnapshotStore

SEED = {
    "description": "An island.",
    "style": "Plain.",
    "story": "The lamp was lit for the first time in the year of the flood.",
    "rules": ["The sea takes what is not tied."],
    "characters": [
        {"id": "ada", "name": "Ada Lund", "description": "Keeper of the lamp."},
        {"id": "bo", "name": "Bo", "description": "Mends nets."},
    ],
    "places": [{"id": "tower", "name": "Old Tower", "description": "Where the lamp stands."}],
    "glossary": {"tide": "The breath of the sea."},
}
OLD = {
    "description": "A drowned valley.",
    "story": "A lamp burned under the water.",
    "characters": [{"id": "eyr", "name": "Eyr", "description": "She kept a lamp too."}],
}
NEW = {"description": "A cold plain.", "story": "There was no lamp here."}


@pytest.fixture
def view() -> Any:
    linked = {"drowned": WorldContent.from_seed(OLD), "plain": WorldContent.from_seed(NEW)}
    return WorldContent.from_seed(SEED).view(linked=linked)


def tool(name: str, **inputs: Any) -> Any:
    return default_registry().build({"block_type": f"tool/{name}"}).run(inputs, strict_types=True)["result"]


def test_search_finds_what_is_known_here(view: Any) -> None:
    """03 W-23: search_content; of this world only, best first, nothing where nothing matches."""
    found = tool("search_content", world=view, query="lamp keeper")
    assert [item["source"] for item in found] == ["entity:ada", "place:tower", "story"]
    assert tool("search_content", world=view, query="lamp", limit=1)[0]["text"].startswith("Ada Lund (entity)")
    assert tool("search_content", world=view, query="dragon") == []


def test_an_entity_is_read_by_id_or_name(view: Any) -> None:
    """03 W-23: read_entity."""
    ada = tool("read_entity", world=view, id="ada")
    assert ada == {"id": "ada", "kind": "entity", "retired": False, "fields": ada["fields"]}
    assert ada["fields"]["description"] == "Keeper of the lamp."
    assert tool("read_entity", world=view, id=" ADA lund ") == ada
    assert tool("read_entity", world=view, id="old tower", kind="place")["id"] == "tower"
    assert tool("read_entity", world=view, id="tide")["id"] == "tide", "of any kind, where none is named"
    with pytest.raises(ToolError, match="no entity 'tide'"):
        tool("read_entity", world=view, id="tide", kind="entity")
    with pytest.raises(ToolError, match="no record 'adda'; did you mean 'ada'"):
        tool("read_entity", world=view, id="adda")
    with pytest.raises(ToolError, match="no rule"):
        tool("read_entity", world=view, id="none", kind="rule")


def test_an_agent_is_told_the_names_of_a_small_world(view: Any) -> None:
    """03 W-22: names restricted to what the world has, in the schema of the call."""
    block = default_registry().build({"block_type": "tool/read_entity"})
    parameters = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
    told = block.narrowed(parameters, {"world": view})["properties"]["id"]  # type: ignore[attr-defined]
    assert told["enum"] == ["Ada Lund", "ada", "Bo", "bo", "Old Tower", "tower", "tide"]
    many = {"characters": [{"id": f"c{i}", "name": f"N{i}", "description": "x"} for i in range(40)]}
    large = WorldContent.from_seed(many).view()
    assert block.narrowed(parameters, {"world": large}) == parameters  # type: ignore[attr-defined]


def test_the_chronicle_is_read_from_its_end(tmp_path: Path) -> None:
    """03 W-23: read_chronicle."""
    world = World.from_template("stub", world_id="chronicled")
    world.store = SnapshotStore(tmp_path)
    content = world.content([world.step(seed=seed) for seed in range(3)][-1].content)
    told = [{key: entry[key] for key in ("step", "narrative")} for entry in content.chronicle()]
    assert [entry["step"] for entry in told] == [1, 2]
    assert tool("read_chronicle", world=content.view(), last=1) == told[-1:]
    assert tool("read_chronicle", world=content.view()) == told
    assert tool("read_chronicle", world=WorldContent.from_seed(SEED).view()) == []


def test_linked_worlds_are_quoted(view: Any) -> None:
    """03 W-23: quote_end_world; only what is linked."""
    found = tool("quote_end_world", world=view, query="lamp")
    assert {item["source"].split("/")[0] for item in found} == {"drowned", "plain"}
    only = tool("quote_end_world", world=view, query="lamp", from_world="drowned")
    assert {item["source"] for item in only} == {"drowned/story", "drowned/entity:eyr"}
    with pytest.raises(ToolError, match="did you mean 'drowned'"):
        tool("quote_end_world", world=view, query="lamp", from_world="drownd")
    own = EndWorld("old", OLD).view()
    assert own.linked_ids == [] and own.search("lamp", linked=True) == []


TOOLS = ("search_content", "read_entity", "read_chronicle", "quote_end_world")


def agent_stage(agent: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Development as an agent that looks into the world before it says what is to happen."""
    nodes = [
        {"node_id": "agent", **agent, "defaults": {"context": "What happens next?"}},
        *({"node_id": name, "block_type": f"tool/{name}"} for name in TOOLS),
    ]
    return {
        "inputs": {"world": "world", "wish": "action"},
        "outputs": {"intent.text": "response"},
        "graph": {
            "id": "decide",
            "nodes": nodes,
            "exposed_inputs": [
                {"name": "wish", "node_id": "agent", "port_name": "context"},
                *({"name": "world", "node_id": name, "port_name": "world"} for name in TOOLS),
            ],
            "exposed_outputs": [{"name": "response", "node_id": "agent", "port_name": "response"}],
            "tools": {name: name for name in TOOLS},
        },
        **more,
    }


SCRIPT = [
    {"tool_calls": [
        {"tool_id": "read_entity", "arguments": {"id": "Ada"}},
        {"tool_id": "search_content", "arguments": {"query": "lists", "limit": 1}},
        {"tool_id": "read_chronicle", "arguments": {"last": 1}},
        {"tool_id": "quote_end_world", "arguments": {"query": "lamp"}},
    ]},
    "{results}",
]  # fmt: skip
SCRIPTED = {"block_type": "agent/scripted", "config": {"script": SCRIPT, "memory": "run"}}
ASKED = {"block_type": "agent/llm", "config": {"llm": {"block_type": "llm/fake"}, "memory": "run", "max_calls": 2}}


def agent_world(folder: Path, agent: dict[str, Any]) -> World:
    config = World.from_template("stub", world_id="ruled").to_config()
    config["execution"]["stages"]["development"] = agent_stage(agent)
    world = World.from_config(config)
    world.store = SnapshotStore(folder)
    return world


def test_a_stage_may_be_an_agent_that_reads_its_world(tmp_path: Path) -> None:
    """03 W-8, W-23: the state contract is the same; the agent reads, only the update writes."""
    world = agent_world(tmp_path, SCRIPTED)
    events: list[Event] = []
    flow = world.begin(seed=1, action="a storm lands")
    before = flow.content
    flow = world.run_stage("development", flow, hooks=[events.append])
    text = State.of(flow.state).read("intent.text")
    assert "'Ada'" in text and "A keeper of lists." in text and "'source': 'entity:ada'" in text
    assert flow.content == before, "an agent changes nothing"
    assert [e.path.rpartition("/")[2] for e in events if e.kind == "tool_end"] == [
        "read_entity", "search_content", "read_chronicle", "quote_end_world",
    ]  # fmt: skip
    again = World.from_config(world.to_config())
    assert again.to_config() == world.to_config()


def test_a_world_with_an_agent_steps_and_repeats_itself(tmp_path: Path) -> None:
    """03 W-8, W-23: with and without an action; equal seeds give equal worlds."""

    def lived(folder: Path) -> list[str]:
        world = agent_world(folder, ASKED)
        first = world.step(None, action="a storm lands", seed=5)
        second = world.step(seed=6)
        assert [r.ran for r in second.stages] == [True] * 6
        return [first.content, second.content]

    assert lived(tmp_path / "a") == lived(tmp_path / "b")


def test_a_stage_with_an_agent_alone() -> None:
    """03 W-8: a stage runs without a world around it; what it needs is asked for."""
    stage = Stage.from_config({"id": "development", "role": "development", **agent_stage(SCRIPTED)})
    view = WorldContent.from_seed(SEED).view()
    result = stage.step(State(), world=view)
    assert result.ran and "Keeper of the lamp." in result.state.read("intent.text")
    unmapped = agent_stage(SCRIPTED, inputs={"wish": "action"})
    unmapped["graph"]["exposed_inputs"] = unmapped["graph"]["exposed_inputs"][:1]
    with pytest.raises(ConfigError, match=r"'world' needs a world.*AGENT_TOOLS"):
        Stage.from_config({"id": "development", "role": "development", **unmapped})


def test_development_of_the_default_world_as_an_agent(tmp_path: Path) -> None:
    """03 W-23: the ready graph of Tidewater, driven by a scripted model: tools first, then the intent under its schema."""
    config = World.from_yaml("worlds/tidewater_agent.yaml").to_config()
    text = json.dumps(config).replace("llm/hf", "llm/fake").replace('"checkpoint_ref": "smollm2-135m-instruct"', "")
    config = json.loads(text)
    for stage in ("author", "development"):
        for node in config["execution"]["stages"][stage]["graph"]["nodes"]:
            node.get("config", {}).pop("search", None)  # ranked by words: no model is needed here
    world = World.from_config(config)
    world.store = SnapshotStore(tmp_path)
    events: list[Event] = []
    flow = world.run_stage("development", world.begin(seed=1, action="a storm lands"), hooks=[events.append])
    intent = State.of(flow.state).read("intent")
    assert set(intent) == {"focus", "text"} and intent["focus"][0] in world.content().ids("entity")
    called = [e for e in events if e.kind == "tool_end"]
    assert called and {e.data["tool_id"] for e in called} <= set(TOOLS)
    asked = next(e.data["request"] for e in events if e.kind == "model_call")
    assert {f["properties"]["tool"]["const"] for f in asked["schema"]["anyOf"]} == set(TOOLS), "no answer before a call"

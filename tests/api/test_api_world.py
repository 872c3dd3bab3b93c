"""A world goes behind an API by one line of its file, and steps, replays and keeps no key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import KEY, ApiServer, chat, status

from wg_blocks.templates import stub
from wg_core import World
from wg_core.errors import WGError
from wg_core.state.store import SnapshotStore


def world(folder: Path, text: dict[str, Any], world_id: str = "far") -> World:
    """The stub world with another `models.text`, and nothing else changed."""
    config = stub(world_id)
    config["execution"]["models"]["text"] = text
    made = World.from_yaml_text(yaml.safe_dump(config, sort_keys=False))
    made.store = SnapshotStore(folder)
    return made


def behind(url: str, **more: Any) -> dict[str, Any]:
    words = {
        "backend": "api",
        "provider": "openai",
        "model_id": "tale-1",
        "endpoint_url": url,
        "api_key_env": "WG_TEST_KEY",
    }
    return {"block_type": "llm/api", "config": {**words, **more}}


def test_a_world_behind_an_api(tmp_path: Path, server: ApiServer) -> None:
    """03 W-21, 05 O-4, 04 X-1: only models.text differs; usage is in the stage records; no key in what is kept."""
    far = world(tmp_path, behind(server.url))
    assert server.seen == [] and far.validate().is_valid and server.seen == []
    first, second = far.evolve(2, seed=3)
    ran = [s.role for s in second.stages if s.ran]
    assert {"philosopher", "author", "development", "architect", "creator"} <= set(ran)
    used = {s.role: s.usage for s in second.stages if s.usage}
    assert set(used) == {"philosopher", "author", "development", "architect"}
    assert all(u["openai/tale-1"]["prompt_tokens"] == 11 * u["openai/tale-1"]["calls"] for u in used.values())
    assert second.carried["intent"]["text"] and first.id != second.id
    assert {h["authorization"] for _, h, _ in server.seen} == {f"Bearer {KEY}"}
    kept = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert kept and not [p for p in kept if KEY.encode() in p.read_bytes()]
    assert KEY not in str(far.to_config()) and far.store.verify("far") == []


def test_equal_seeds_and_replay(tmp_path: Path, server: ApiServer) -> None:
    """03 C-10: a server that answers equally gives equal snapshots; a replay asks nobody."""
    first, other = (world(tmp_path / name, behind(server.url)) for name in "ab")
    snapshots = [s.id for s in first.evolve(2, seed=3)]
    assert snapshots == [s.id for s in other.evolve(2, seed=3)]
    asked = len(server.seen)
    assert first.replay().same and len(server.seen) == asked


def test_worlds_share_one_block_and_one_client(tmp_path: Path, server: ApiServer) -> None:
    """03 W-20, 01 F-35: all stages of all worlds; equal words, one object."""
    worlds = [world(tmp_path, behind(server.url), name) for name in ("one", "two")]
    blocks = [b for w in worlds for b in w.iter_blocks() if b.block_type == "llm/api"]
    assert blocks and len({id(b) for b in blocks}) == 1


def test_a_stage_that_cannot_be_answered_fails_with_its_place(tmp_path: Path, server: ApiServer) -> None:
    """03 W-22: the step fails and nothing is published; it can be run again."""
    far = world(tmp_path, behind(server.url, max_retries=0))
    server.replies.extend([chat("no structure")] * 3)
    with pytest.raises(WGError, match=r"development/.*gave no valid structure in 3 attempts.*no structure"):
        far.step(seed=3)
    server.replies.append(status(429, "no more", "insufficient_quota"))
    with pytest.raises(WGError, match="quota is used up"):
        far.step(seed=3)
    assert far.history() == []
    assert far.step(seed=3).step == 0


def test_the_fake_provider_needs_no_server(tmp_path: Path) -> None:
    """01 T-23, F-35: offline, the same at every run."""
    words = {"block_type": "llm/api", "config": {"backend": "api", "provider": "fake", "model_id": "any"}}
    first, other = (world(tmp_path / name, words) for name in "ab")
    assert [s.id for s in first.evolve(2, seed=1)] == [s.id for s in other.evolve(2, seed=1)]


def test_a_world_that_is_wholly_behind_an_api(tmp_path: Path, server: ApiServer) -> None:
    """01 T-20, F-30, 03 W-21: the Creator's pictures too; the record names the bytes that the world keeps."""
    config = stub("far")
    config["execution"]["models"]["text"] = behind(server.url)
    drawn = {
        "block_type": "generator/api",
        "config": {**behind(server.url)["config"], "model_id": "brush-1", "size": "12x8"},
    }
    (dispatch,) = config["execution"]["stages"]["creator"]["graph"]["nodes"]
    dispatch["config"]["makers"]["map"]["block"] = drawn
    far = World.from_yaml_text(yaml.safe_dump(config, sort_keys=False))
    far.store = SnapshotStore(tmp_path)
    first, second = far.evolve(2, seed=3)
    (artifact,) = second.carried["artifacts"]["images"]
    assert (artifact["width"], artifact["height"]) == (12, 8)
    assert [c["answer"] for c in far.calls(second)["creator"]] == [artifact["id"]]
    asked = len(server.seen)
    assert far.replay().same and len(server.seen) == asked and first.id != second.id


TOOLS = ("search_content", "read_entity", "read_chronicle", "quote_end_world")


def thinking(config: dict[str, Any], role: str) -> None:
    """Make the model of a stage an agent that has the world's tools, by the stage's own words alone."""
    stage = config["execution"]["stages"][role]
    graph = stage["graph"]
    agent = {"llm": {"model": "text"}, "calling": "native", "memory": "run", "min_calls": 1, "max_calls": 2}
    nodes = [n for n in graph["nodes"] if n["node_id"] not in ("llm", "context")]
    graph["nodes"] = [*nodes, {"node_id": "llm", "block_type": "agent/llm", "config": agent}]
    graph["nodes"] += [{"node_id": name, "block_type": f"tool/{name}"} for name in TOOLS]
    ports = {"prompt": "context", "text": "response", "data": "response"}
    edges = [e for e in graph["edges"] if e["source_node"] != "context"]
    graph["edges"] = [
        {**e, **{k: ports[e[k]] for n, k in (("source_node", "source_port"), ("target_node", "target_port")) if e[n] == "llm"}}
        for e in edges
    ]
    inputs = [x for x in graph["exposed_inputs"] if x["node_id"] != "context"]
    graph["exposed_inputs"] = [*inputs, *({"name": "world", "node_id": name, "port_name": "world"} for name in TOOLS)]
    for x in graph["exposed_outputs"]:
        x["port_name"] = ports[x["port_name"]] if x["node_id"] == "llm" else x["port_name"]
    graph["tools"] = {name: {"node": name} for name in TOOLS}
    if "inputs" in stage:
        stage["inputs"] |= {"world": "world"}


def test_every_stage_that_writes_may_be_an_agent(tmp_path: Path, server: ApiServer) -> None:
    """03 W-21, W-23, W-22, 04 X-5: native calls over sockets, answers under each stage's schema, and a replay that asks nobody."""
    config = stub("thought")
    config["execution"]["models"]["text"] = behind(server.url)
    for role in ("philosopher", "author", "development", "architect"):
        thinking(config, role)
    world = World.from_yaml_text(yaml.safe_dump(config, sort_keys=False))
    world.store = SnapshotStore(tmp_path)
    reads = [{"id": "a", "type": "function", "function": {"name": "read_entity", "arguments": '{"id": "Ada"}'}}]
    reads += [{"id": "b", "type": "function", "function": {"name": "search_content", "arguments": '{"query": "shores", "limit": 99}'}}]
    server.replies.extend([chat(None, "tool_calls", tool_calls=reads), None] * 2)
    first = world.step(None, action="a storm lands", seed=3)
    server.replies.extend([chat(None, "tool_calls", tool_calls=reads), None] * 4)
    second = world.step(seed=4)
    assert [r.ran for r in second.stages] == [True] * 6 and first.id != second.id
    assert {r.role: r.usage["openai/tale-1"]["calls"] for r in second.stages if r.usage} == dict.fromkeys(
        ("philosopher", "author", "development", "architect"), 2
    )
    asked = [body for _, _, body in server.seen]
    assert [b["tool_choice"] for b in asked] == ["required", "none"] * 6, "looks first, answers when its calls are used up"
    assert {t["function"]["name"] for t in asked[0]["tools"]} == set(TOOLS)
    names = next(t for t in asked[0]["tools"] if t["function"]["name"] == "read_entity")["function"]["parameters"]
    assert {"Ada", "ada", "the Cove"} <= set(names["properties"]["id"]["enum"]), "told the names that the world has"
    told = [m["content"] for b in asked for m in b["messages"] if m["role"] == "tool"]
    assert sum("A keeper of lists." in t for t in told) == 6 and sum("99 is greater than the maximum of 20" in t for t in told) == 6
    assert world.replay().same and len(server.seen) == 12 and world.store.verify("thought") == []

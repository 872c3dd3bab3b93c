"""Versions of written formats."""

from __future__ import annotations

from typing import Any

import pytest

from wg_core import ConfigError, Graph
from wg_core.assembly.migrate import migrated, version_problems
from wg_core.structure.versions import Format

GRAPH: dict[str, Any] = {"kind": "graph", "schema_version": "1.0", "id": "g", "nodes": []}


def newer() -> Format:
    """A format two minors on: first `nodes` were called `blocks`, then the id was called `name`."""
    made = Format("file", "1.2")

    @made.migration("1.0", "1.1")
    def blocks(data: dict[str, Any]) -> dict[str, Any]:
        if "blocks" in data:
            data["nodes"] = data.pop("blocks")
        return data

    @made.migration("1.1", "1.2")
    def name(data: dict[str, Any]) -> dict[str, Any]:
        if "name" in data:
            data["id"] = data.pop("name")
        return data

    return made


def test_an_older_minor_is_brought_up_step_by_step() -> None:
    """02 S-10: all steps from where the file is; the given data stays as it is."""
    old = {"kind": "graph", "schema_version": "1.0", "name": "g", "blocks": []}
    assert newer().upgrade(old, "1.0") == {"kind": "graph", "schema_version": "1.2", "id": "g", "nodes": []}
    assert newer().upgrade({"name": "g", "nodes": []}, "1.1") == {"schema_version": "1.2", "id": "g", "nodes": []}
    assert newer().upgrade(GRAPH, "1.2") == GRAPH and old["schema_version"] == "1.0" and "blocks" in old


def test_every_level_in_a_file_has_its_own_version() -> None:
    """02 S-10: what is inside is migrated from its own version, else from that of what it stands in."""
    graph = {"kind": "graph", "name": "g", "blocks": []}
    pipeline = {
        "kind": "pipeline",
        "schema_version": "1.1",
        "name": "p",
        "nodes": [{"node_id": "a", "config": {**graph, "schema_version": "1.0"}}, {"node_id": "b", "config": {"name": "h", "nodes": []}}],
    }
    stage = {"kind": "stage", "schema_version": "1.1", "name": "s", "nodes": [{"node_id": "p", "config": pipeline}]}
    world = {"kind": "world", "execution": {"stages": {"s": stage, "t": {"schema_version": "1.0", "graph": graph}}}}
    stages = migrated(world, "world", newer())["execution"]["stages"]
    inner = stages["s"]["nodes"][0]["config"]["nodes"]
    assert inner[0]["config"] == {"kind": "graph", "schema_version": "1.2", "id": "g", "nodes": []}
    assert inner[1]["config"]["id"] == "h" and stages["s"]["id"] == "s"
    assert stages["t"]["graph"]["nodes"] == [] and stages["t"]["graph"]["id"] == "g"
    assert pipeline["name"] == "p"
    lora = {"kind": "world", "execution": {"base": {"world": {"kind": "world", "schema_version": "1.1", "name": "w"}}}}
    assert migrated(lora, "world", newer())["execution"]["base"]["world"] == {"kind": "world", "schema_version": "1.2", "id": "w"}


def test_another_major_is_refused_with_both_versions() -> None:
    """02 S-10."""
    made = newer()
    assert made.problem("1.9") == "" == made.problem("1.0")
    assert made.problem("2.0") == "this file has schema version 2.0, this engine reads 1.2; use a newer engine"
    assert "0.9, this engine reads 1.2" in made.problem("0.9")
    for wrong in ("1", "1.x", 1.0, None, "1.0.0", "-1.0", "٣.٣"):
        assert "'major.minor'" in made.problem(wrong)
    deep = {"kind": "pipeline", "nodes": [{"node_id": "g", "config": {**GRAPH, "schema_version": "3.0"}}]}
    assert [place for place, _ in version_problems(deep, "pipeline", made)] == [("nodes", 0, "config")]
    with pytest.raises(ConfigError, match=r"<text>:2: schema_version: this file has schema version 2.0") as caught:
        Graph.from_yaml_text("kind: graph\nschema_version: '2.0'\nnodes: []\n")
    assert caught.value.code == "VERSION"


def test_steps_lead_on_and_are_there_once() -> None:
    made = newer()
    for old, new, said in (("1.1", "1.0", "no step"), ("1.2", "1.3", "no step"), ("0.9", "1.0", "no step"), ("1.0", "1.2", "already")):
        with pytest.raises(ValueError, match=said):
            made.migration(old, new)

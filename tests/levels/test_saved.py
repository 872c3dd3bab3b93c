"""Levels as folders: at each level, in each format, with references inlined, kept or extracted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "weights"))

import nets
from nets import Linear, Memory, bits, shaken

from wg_core import BlockRegistry, ConfigError, Graph, ModelPool, Pipeline, Port, Stage, State, World
from wg_core.assembly.loader import register_ref_scheme
from wg_core.errors import CheckpointError
from wg_core.levels.saved import read_manifest

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def node(node_id: str, block_type: str, **config: Any) -> dict[str, Any]:
    return {"node_id": node_id, "block_type": block_type, **({"config": config} if config else {})}


def edge(source: str, source_port: str, target: str, target_port: str) -> dict[str, Any]:
    return {"source_node": source, "source_port": source_port, "target_node": target, "target_port": target_port}


def ends(first: str, last: str) -> dict[str, Any]:
    return {
        "exposed_inputs": [{"name": "x", "node_id": first, "port_name": "x"}],
        "exposed_outputs": [{"name": "y", "node_id": last, "port_name": "y"}],
    }


def graph(ref: str, id: str = "g") -> dict[str, Any]:
    """A model by reference, a net that stands there twice, and a block with a memory."""
    nodes = [node("model", "test/linear", checkpoint_ref=ref), node("own", "test/net"), {"node_id": "twin", "shares": "own"}]
    nodes.append(node("memory", "test/memory"))
    edges = [edge("model", "y", "own", "x"), edge("own", "y", "twin", "x"), edge("twin", "y", "memory", "x")]
    links = [{"target_kind": "world", "target_id": "lost"}]
    return {"kind": "graph", "schema_version": "1.0", "id": id, "nodes": nodes, "edges": edges, "links": links, **ends("model", "memory")}


def pipeline(ref: str) -> dict[str, Any]:
    nodes = [{"node_id": n, "config": graph(ref, n)} for n in ("one", "two")]
    return {"kind": "pipeline", "id": "p", "nodes": nodes, "edges": [edge("one", "y", "two", "x")], **ends("one", "two")}


def stage(ref: str) -> dict[str, Any]:
    head = {"kind": "stage", "id": "s", "role": "s", "reads": ["intent"], "writes": ["outcome"]}
    mapping = {"inputs": {"x": "intent.text"}, "outputs": {"outcome.narrative": "y"}}
    nodes = [node("told", "test/told", checkpoint_ref=ref), node("memory", "test/memory")]
    inner = {"kind": "graph", "id": "left", "nodes": nodes, "edges": [edge("told", "y", "memory", "x")], **ends("told", "memory")}
    whole = {"kind": "pipeline", "id": "p", "nodes": [{"node_id": "left", "config": inner}]}
    return {**head, **mapping, "nodes": [{"node_id": "p", "config": whole}]}


class Told(Linear):
    """Text in, text with a number out of the weights."""

    ports = (Port("x", "in", "text"), Port("y", "out", "text"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": f"{inputs['x']} {self.modules['net'].weight.sum().item()}"}


class Remembered(Memory):
    ports = (Port("x", "in", "any"), Port("y", "out", "any"))


def registry() -> BlockRegistry:
    made = nets.registry()
    made.register("test/told", Told)
    made.register("test/memory", Remembered, override=True)
    return made


KINDS: dict[str, tuple[type[Any], Callable[[str], dict[str, Any]]]] = {"graph": (Graph, graph), "pipeline": (Pipeline, pipeline), "stage": (Stage, stage)}


def run(level: Any) -> Any:
    """What a level gives, as something to compare."""
    if isinstance(level, Stage):
        return level.run({"state": State.of({"intent": {"text": "calm"}})})["state"].to_json()
    return level.run({"x": X})["y"].tolist()


@pytest.fixture
def ref(tmp_path: Path) -> str:
    from safetensors.torch import save_file

    save_file(Linear().state_dict(), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


FORMATS = [(form, backend) for form in ("dir", "archive") for backend in ("safetensors", "json", "torch")]


@pytest.mark.parametrize(("form", "backend"), FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_level_comes_back_whole(kind: str, form: str, backend: str, ref: str, tmp_path: Path) -> None:
    """02 S-1, S-4, S-5, S-7, S-13: config, weights, outputs and sharing; one file for each block with state."""
    cls, config = KINDS[kind]
    level = shaken(cls.from_config(config(ref), registry=registry(), pool=ModelPool()))
    wanted, state, blocks = run(level), bits(level.state_dict()), [id(b) for _, b in level.block_paths()]
    level.save(tmp_path / "saved", format=form, backend=backend)
    Path(ref).unlink()
    again = cls.load(tmp_path / "saved", registry=registry())
    assert again.to_config() == level.to_config() and again.config_hash == level.config_hash
    assert bits(again.state_dict()) == state and run(again) == wanted
    own = [id(b) for _, b in again.block_paths()]
    assert [own.index(b) for b in own] == [blocks.index(b) for b in blocks]
    if form == "dir":
        files = list((tmp_path / "saved" / "checkpoint" / "blocks").iterdir())  # each block here has tensors or values
        assert len(files) == len(set(own))


@pytest.mark.parametrize(("form", "backend"), FORMATS)
def test_a_world_comes_back_whole(form: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """02 S-1, S-13: a world too, and its next step is the same."""
    monkeypatch.setenv("WG_HOME", str(tmp_path / "home"))
    world = World.from_template("stub", world_id="isle", seed=1)
    creator = next(iter(next(iter(world.stages["creator"].nodes.values())).child.nodes.values())).child
    creator.add_node("conditioner/toy", "extra", config={"dim": 4}, defaults={"input": "x"})
    shaken(world).save(tmp_path / "saved", format=form, backend=backend)
    again = World.load(tmp_path / "saved")
    assert again.to_config() == world.to_config() and again.config_hash == world.config_hash
    assert [bits(b.state_dict()) for _, b in again.block_paths()] == [bits(b.state_dict()) for _, b in world.block_paths()]
    again.set_storage(tmp_path / "other")
    assert again.step().content == world.step().content


# ---- what a manifest says ----------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_saved(ref: str, tmp_path: Path) -> None:
    """02 S-7: kind, versions, contract hash, libraries, hashes, training configuration."""
    level = Graph.from_config(graph(ref), registry=registry(), pool=ModelPool())
    level.save(tmp_path / "saved", training={"lr": 1e-3, "trainable": ["own"]})
    found = read_manifest(tmp_path / "saved")
    assert found["kind"] == "graph" and found["schema_version"] == "1.0" and found["checkpoint_version"] == "1.1"
    assert found["contract_hash"] == level.contract_hash() and found["libraries"]["torch"]
    assert found["training"] == {"lr": 1e-3, "trainable": ["own"]}
    level.save(tmp_path / "saved")
    assert "training" not in read_manifest(tmp_path / "saved")
    for training, said in (({"lr": float("nan")}, "no plain JSON|not plain JSON"), ({"api_key": "x" * 30}, "looks like a secret")):
        with pytest.raises(ConfigError, match=said):
            level.save(tmp_path / "saved", training=training)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"saved_version": "2.0"}, "schema version 2.0, this engine reads 1.0"),
        ({"kind": "pipeline"}, "holds a pipeline, not a graph"),
        ({"contract_hash": "0" * 64}, "other ports here than where it was saved"),
        ({"config": {"file": "../config.yaml", "sha256": "0"}}, "leaves its root folder"),
        ({"config": {"file": "config.yaml"}}, "no readable manifest"),
        ({"config": {"file": "config.yaml", "sha256": "", "parts": []}}, "no readable manifest"),
        ({"config": {"file": "config.yaml", "sha256": "", "refs": {"a": 1}}}, "its manifest names no files"),
        ({"config": {"file": "a\0b", "sha256": ""}}, "is that of no file"),
        ({"checkpoint": {"file": 3, "sha256": "0"}}, "names no files"),
        (None, "no readable manifest"),
    ],
)
def test_a_strange_manifest_is_refused(change: dict[str, Any] | None, said: str, ref: str, tmp_path: Path) -> None:
    """02 S-10, S-12."""
    Graph.from_config(graph(ref), registry=registry(), pool=ModelPool()).save(tmp_path / "saved")
    path = tmp_path / "saved" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change is not None else "{")
    with pytest.raises(CheckpointError, match=said):
        Graph.load(tmp_path / "saved", registry=registry())


def test_swapped_parts_are_noticed(ref: str, tmp_path: Path) -> None:
    """02 S-12: the checkpoint of another level, or files of one block under another's name, are not loaded."""
    for name in ("a", "b"):
        level = Graph.from_config(graph(ref), registry=registry(), pool=ModelPool())
        (shaken(level) if name == "b" else level).save(tmp_path / name)
    shutil.rmtree(tmp_path / "a" / "checkpoint")
    shutil.copytree(tmp_path / "b" / "checkpoint", tmp_path / "a" / "checkpoint")
    with pytest.raises(CheckpointError, match=r"index\.json does not match its hash"):
        Graph.load(tmp_path / "a", registry=registry())
    one, two = sorted((tmp_path / "b" / "checkpoint" / "blocks").glob("*.safetensors"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(CheckpointError, match="does not match its hash"):
        Graph.load(tmp_path / "b", registry=registry())


# ---- references --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(ref: str, tmp_path: Path) -> Path:
    """A pipeline of one graph file, once as it is and once with another title; gives the pipeline's file."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "graph.yaml").write_text(yaml.safe_dump(graph(ref)))
    two = {"ref": "graph.yaml", "overrides": {"id": "two", "title": "Second"}}
    nodes = [{"node_id": "one", "config": {"ref": "graph.yaml"}}, {"node_id": "two", "config": two}]
    main = {**pipeline(ref), "nodes": nodes}
    (tmp_path / "src" / "main.yaml").write_text(yaml.safe_dump(main))
    return tmp_path / "src" / "main.yaml"


def test_refs_are_inlined_by_default(files: Path, tmp_path: Path) -> None:
    """02 S-7: restored elsewhere, without the files."""
    level = Pipeline.from_yaml(files, registry=registry(), pool=ModelPool())
    level.save(tmp_path / "saved")
    shutil.rmtree(files.parent)
    assert "ref:" not in (tmp_path / "saved" / "config.yaml").read_text().replace("checkpoint_ref:", "")
    assert Pipeline.load(tmp_path / "saved", registry=registry()).to_config() == level.to_config()


def test_levels_are_extracted_into_files(files: Path, tmp_path: Path) -> None:
    """02 S-7: each level below is a file that stands for itself."""
    level = shaken(Pipeline.from_yaml(files, registry=registry(), pool=ModelPool()))
    level.save(tmp_path / "saved", refs="extract")
    shutil.rmtree(files.parent)
    parts = sorted((tmp_path / "saved" / "parts").iterdir())
    assert [p.name for p in parts] == ["graph_g.yaml", "graph_two.yaml"]
    assert Graph.from_yaml(parts[0], registry=registry(), pool=ModelPool()).id == "g"
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    again = Pipeline.load(tmp_path / "elsewhere", registry=registry())
    assert again.to_config() == level.to_config() and bits(again.state_dict()) == bits(level.state_dict())
    (tmp_path / "elsewhere" / "parts" / "graph_g.yaml").write_text(yaml.safe_dump(graph("other")))
    with pytest.raises(CheckpointError, match=r"graph_g\.yaml does not match its hash"):
        Pipeline.load(tmp_path / "elsewhere", registry=registry())


def test_a_world_is_extracted_down_to_its_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """02 S-7."""
    monkeypatch.setenv("WG_HOME", str(tmp_path / "home"))
    world = World.from_template("stub", world_id="isle")
    world.save(tmp_path / "saved", refs="extract")
    names = {p.name for p in (tmp_path / "saved" / "parts").iterdir()}
    assert {f"stage_{role}.yaml" for role in world.stages} <= names and any(n.startswith("graph_") for n in names)
    again = World.load(tmp_path / "saved")
    assert again.to_config() == world.to_config()


def test_refs_are_kept_where_they_still_say_the_same(files: Path, tmp_path: Path) -> None:
    """02 S-7, G-54: the files stay the source; outside the folder only if that is allowed."""
    level = Pipeline.from_yaml(files, registry=registry(), pool=ModelPool())
    level.save(tmp_path / "saved", refs="keep")
    nodes = yaml.safe_load((tmp_path / "saved" / "config.yaml").read_text())["nodes"]
    assert nodes[0]["config"] == {"ref": "../src/graph.yaml"}
    assert nodes[1]["config"] == {"ref": "../src/graph.yaml", "overrides": {"id": "two", "title": "Second"}}
    with pytest.raises(ConfigError, match=r"leaves the folder.*unless allow_outside_root is given") as caught:
        Pipeline.load(tmp_path / "saved", registry=registry())
    assert caught.value.code == "BAD_REF"
    again = Pipeline.load(tmp_path / "saved", registry=registry(), allow_outside_root=True)
    assert again.to_config() == level.to_config() and bits(again.state_dict()) == bits(level.state_dict())
    file = files.parent / "graph.yaml"
    file.write_text(file.read_text() + "title: changed\n")
    with pytest.raises(CheckpointError, match=r"graph\.yaml does not match its hash"):
        Pipeline.load(tmp_path / "saved", registry=registry(), allow_outside_root=True)
    with pytest.raises(ConfigError, match=r"nodes\.0\.config\.title is not what the file that it came from says"):
        level.save(tmp_path / "again", refs="keep")
    assert not (tmp_path / "again").exists()


def test_refs_of_graphs_that_were_added_from_files_are_kept_too(files: Path, tmp_path: Path) -> None:
    level = Pipeline("p")
    level.add_graph(Graph.from_yaml(files.parent / "graph.yaml", registry=registry(), pool=ModelPool()))
    with pytest.raises(ConfigError, match="'test/linear' is not registered"):
        level.save(tmp_path / "saved", refs="keep")  # a pipeline built in code is read again with the usual registry
    empty = Pipeline("q")
    empty.add_graph(Graph.from_config(graph("x"), registry=registry(), pool=ModelPool()))
    with pytest.raises(ConfigError, match="built from no file with refs"):
        empty.save(tmp_path / "saved", refs="keep")
    with pytest.raises(ConfigError, match="refs is one of inline, keep, extract, not 'copy'"):
        empty.save(tmp_path / "saved", refs="copy")


def test_refs_may_have_schemes_of_ones_own(files: Path, tmp_path: Path) -> None:
    """02 G-54: none by default; registered ones name files, and are kept as they are."""
    main = files.read_text().replace("ref: graph.yaml", "ref: parts-of-saved:graph")
    files.write_text(main)
    with pytest.raises(ConfigError, match="ref is the path of a file, not 'parts-of-saved:graph'"):
        Pipeline.from_yaml(files, registry=registry())
    known = {"parts-of-saved:graph": files.parent / "graph.yaml"}
    register_ref_scheme("parts-of-saved", known.__getitem__)
    with pytest.raises(ConfigError, match=r"resolved by .* already"):
        register_ref_scheme("parts-of-saved", lambda name: Path(name))
    with pytest.raises(ConfigError, match="'HTTP'"):
        register_ref_scheme("HTTP", lambda name: Path(name))
    level = Pipeline.from_yaml(files, registry=registry(), pool=ModelPool())
    level.save(tmp_path / "saved", refs="keep")
    assert Pipeline.load(tmp_path / "saved", registry=registry()).to_config() == level.to_config()
    files.write_text(main.replace("saved:graph", "saved:lost"))
    with pytest.raises(ConfigError, match="'parts-of-saved:lost' is not found"):
        Pipeline.from_yaml(files, registry=registry())


def test_refs_leave_the_folder_only_if_that_is_allowed(files: Path, tmp_path: Path) -> None:
    """02 G-54."""
    below = files.parent / "below"
    below.mkdir()
    (below / "main.yaml").write_text(files.read_text().replace("ref: graph.yaml", "ref: ../graph.yaml"))
    with pytest.raises(ConfigError, match="allow_outside_root"):
        Pipeline.from_yaml(below / "main.yaml", registry=registry())
    assert Pipeline.from_yaml(below / "main.yaml", registry=registry(), allow_outside_root=True).id == "p"

"""Checkpoints: what goes in comes out bit by bit, each block once; what is broken or strange changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import string
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Linear, Memory, Net, Odd, Outer, bits, chain, registry, shaken
from safetensors.torch import save_file

from wg_core import Block, EndWorld, Graph, ModelPool, Pipeline, Stage, World
from wg_core.errors import CheckpointError, ConfigError, NodeExecutionError, StateDictError
from wg_core.weights import archive
from wg_core.weights.backends import get_backend, register_backend
from wg_core.weights.checkpoint import read_state

X = torch.linspace(-1, 1, 12).reshape(4, 3)
FORMATS = [("dir", "safetensors"), ("dir", "json"), ("dir", "torch"), ("archive", "safetensors"), ("archive", "json")]


def index(path: Path) -> dict[str, Any]:
    return json.loads((path / "index.json").read_text())


def files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


# ---- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "backend"), FORMATS)
@pytest.mark.parametrize("cls", [Net, Odd, Memory, Outer])
def test_a_block_comes_back_bit_by_bit(cls: type[Block], form: str, backend: str, tmp_path: Path) -> None:
    # proves 01 A-5, F-24, 02 S-4, S-5, S-6
    block = shaken(cls())
    block.save_checkpoint(tmp_path / "c", format=form, backend=backend)
    other = cls()
    report = other.load_from_checkpoint(tmp_path / "c")
    assert report.missing == report.unexpected == ()
    assert bits(other.state_dict()) == bits(block.state_dict())
    assert (tmp_path / "c").is_dir() is (form == "dir")


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    block = shaken(Odd())
    block.save_checkpoint(tmp_path / "c")
    entry = next(iter(index(tmp_path / "c")["blocks"].values()))
    assert entry["tensors"]["aliases"] == {"odd.out.weight": "odd.embed.weight"}
    stored = read_state(tmp_path / "c" / entry["tensors"]["file"])
    assert "odd.out.weight" not in stored and stored["odd.view"].tolist() == [2, 3]
    other = Odd()
    other.load_from_checkpoint(tmp_path / "c")
    net = other.modules["odd"]
    assert net.out.weight is net.embed.weight and torch.equal(net.out.weight, block.modules["odd"].out.weight)


def test_a_saved_checkpoint_does_not_follow_later_changes(tmp_path: Path) -> None:
    block = Linear()
    before = bits(block.state_dict())
    block.save_checkpoint(tmp_path / "c")
    shaken(block)
    other = Linear(init_seed=5)
    other.load_from_checkpoint(tmp_path / "c")
    assert bits(other.state_dict()) == before


def test_missing_unexpected_and_misshapen_keys_change_nothing(tmp_path: Path) -> None:
    # proves 01 A-5, 02 S-9
    block = Outer()
    state, before = block.state_dict(), bits(block.state_dict())
    del state["net.head.bias"]
    for wrong, said in (
        (state, r"missing \['net\.head\.bias'\]"),
        ({**block.state_dict(), "extra": 1}, r"unexpected \['extra'\]"),
        ({**block.state_dict(), "deep.net.head.bias": torch.zeros(9)}, r"deep\.net\.head\.bias"),
        ({**block.state_dict(), "net.head.bias": "text"}, r"net\.head\.bias"),
    ):
        with pytest.raises(StateDictError, match=said):
            block.load_state_dict(wrong)
    assert bits(block.state_dict()) == before
    wide, small = tmp_path / "wide", tmp_path / "small"
    Net(width=4).save_checkpoint(wide)
    Linear().save_checkpoint(small)
    net = Net()
    before = bits(net.state_dict())
    with pytest.raises(StateDictError, match=r"block:enc\.0\.weight is Tensor\[4, 4\].*not Tensor\[3, 3\]"):
        net.load_from_checkpoint(wide)
    with pytest.raises(StateDictError, match=r"block:head\.bias is Tensor\[4\]"):
        net.load_from_checkpoint(wide, strict=False)
    with pytest.raises(StateDictError, match=r"missing \['block:enc\.0\.weight'.*unexpected \['block:net\.weight'\]"):
        net.load_from_checkpoint(small)
    assert bits(net.state_dict()) == before
    report = net.load_from_checkpoint(small, strict=False)
    assert report.unexpected == ("block:net.weight",) and len(report.missing) == 9
    assert bits(net.state_dict()) == before


def test_whole_and_broken_numbers_are_not_mixed(tmp_path: Path) -> None:
    block = Odd()
    block.materialize()
    block.modules["odd"].rows = torch.arange(6).float() / 4
    block.save_checkpoint(tmp_path / "c")
    with pytest.raises(StateDictError, match=r"odd\.rows"):
        Odd().load_from_checkpoint(tmp_path / "c")


def test_a_block_that_refuses_its_values_leaves_all_blocks_as_they_were(tmp_path: Path) -> None:
    # proves 02 U-2
    bad = Outer()
    bad.parts["deep"].parts["memory"].count = -1
    shaken(bad.parts["net"])
    bad.parts["memory"].notes = ["changed"]
    bad.save_checkpoint(tmp_path / "c")
    block = Outer()
    before = bits(block.state_dict())
    with pytest.raises(StateDictError, match="not negative"):
        block.load_from_checkpoint(tmp_path / "c")
    assert bits(block.state_dict()) == before
    with pytest.raises(StateDictError, match="not negative"):
        block.load_state_dict(bad.state_dict())
    assert bits(block.state_dict()) == before
    graph, other = chain(("a", block)), chain(("a", bad))
    with pytest.raises(StateDictError, match="not negative"):
        graph.load_state_dict(other.state_dict())
    assert bits(block.state_dict()) == before


def test_a_failed_load_into_a_block_without_weights_leaves_it_without(tmp_path: Path) -> None:
    Linear().save_checkpoint(tmp_path / "c")
    net = Net()
    with pytest.raises(StateDictError):
        net.load_from_checkpoint(tmp_path / "c")
    assert not net.materialized


def test_only_tensors_and_json_are_state(tmp_path: Path) -> None:
    for value, said in (
        (object(), "neither tensor nor JSON"),
        (b"x", "neither"),
        ({1: "x"}, "keys must be texts"),
        (float("nan"), "neither"),
    ):
        block = Memory()
        block.notes = value
        block.own_state_dict = lambda block=block: {"notes": block.notes}  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match=said):
            block.save_checkpoint(tmp_path / "c")
        assert not (tmp_path / "c").exists() and list(tmp_path.iterdir()) == []


def test_a_backend_is_added_by_name(tmp_path: Path) -> None:
    class Numbered:
        suffix = ".numbered"

        def write(self, path: Path, tensors: dict[str, Any]) -> None:
            get_backend("json").write(path, dict(sorted(tensors.items())))

        def read(self, path: Path) -> dict[str, Any]:
            return get_backend("json").read(path)

    register_backend("numbered", Numbered())
    with pytest.raises(CheckpointError, match="registered already"):
        register_backend("numbered", Numbered())
    block = shaken(Net())
    block.save_checkpoint(tmp_path / "c", backend="numbered")
    other = Net()
    other.load_from_checkpoint(tmp_path / "c")
    assert bits(other.state_dict()) == bits(block.state_dict())
    for options, said in (({"backend": "numberd"}, "did you mean 'numbered'"), ({"format": "single"}, "dir, archive")):
        with pytest.raises(CheckpointError, match=said):
            block.save_checkpoint(tmp_path / "d", **options)


def test_torch_files_run_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"net.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"bomb\.pt is no readable torch file"):
        read_state(tmp_path / "bomb.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        read_state(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint backend reads \.pkl"):
        (tmp_path / "x.pkl").touch()
        read_state(tmp_path / "x.pkl")
    assert not (tmp_path / "owned").exists()


# ---- whole levels --------------------------------------------------------------------------------------------------------


def shared_pipeline(ref: str) -> Pipeline:
    """Two graphs that share a model; one with a block of its own and one used twice by hand."""
    reg, pool = registry(), ModelPool()
    pipeline = Pipeline("p")
    for graph_id in ("one", "two"):
        graph = Graph(graph_id)
        graph.add_node("test/linear", "model", config={"checkpoint_ref": ref}, registry=reg, pool=pool)
        graph.add_node("test/net", "own", registry=reg, pool=pool)
        graph.add_node(graph.nodes["own"].child, "again")
        graph.add_node("test/memory", "memory", registry=reg, pool=pool)
        graph.add_edge("model", "y", "own", "x")
        graph.add_edge("own", "y", "again", "x")
        graph.add_edge("again", "y", "memory", "x")
        graph.expose_input("model", "x", "x")
        graph.expose_output("memory", "y", "y")
        pipeline.add_graph(graph)
    pipeline.add_edge("one", "y", "two", "x")
    pipeline.expose_input("one", "x", "x")
    pipeline.expose_output("two", "y", "y")
    return pipeline


@pytest.fixture
def ref(tmp_path: Path) -> str:
    save_file(shaken(Linear()).state_dict(), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("form", "backend"), FORMATS)
def test_a_level_is_restored_elsewhere_without_its_references(
    form: str, backend: str, ref: str, tmp_path: Path
) -> None:
    # proves 01 A-10, T-43, 02 S-3, S-13
    pipeline = shaken(shared_pipeline(ref))
    wanted = pipeline.run({"x": X})["y"]
    pipeline.save(tmp_path / "saved", format=form, backend=backend)
    os.remove(ref)
    loaded = Pipeline.load(tmp_path / "saved", registry=registry())
    assert loaded.to_config() == pipeline.to_config()
    assert bits(loaded.state_dict()) == bits(pipeline.state_dict())
    assert torch.equal(loaded.run({"x": X})["y"], wanted)
    one, two = (loaded.nodes[n].child.nodes for n in ("one", "two"))
    assert one["model"].child is two["model"].child
    assert one["own"].child is one["again"].child is not two["own"].child
    with pytest.raises(NodeExecutionError, match="MissingModelError"):
        Pipeline.from_config(pipeline.to_config(), registry=registry(), pool=ModelPool()).run({"x": X})


@pytest.mark.parametrize(("form", "backend"), FORMATS)
def test_a_block_that_graphs_share_by_hand_comes_back_as_one(form: str, backend: str, ref: str, tmp_path: Path) -> None:
    """02 S-13: without a model reference too; equal blocks that were two stay two."""
    pipeline = shared_pipeline(ref)
    one, two = (pipeline.nodes[n].child for n in ("one", "two"))
    two.replace_block("own", one.nodes["own"].child)
    shaken(pipeline)
    pipeline.save(tmp_path / "saved", format=form, backend=backend)
    loaded = Pipeline.load(tmp_path / "saved", registry=registry())
    one, two = (loaded.nodes[n].child for n in ("one", "two"))
    assert one.nodes["own"].child is one.nodes["again"].child is two.nodes["own"].child
    assert one.nodes["memory"].child is not two.nodes["memory"].child
    assert len(list(loaded.trainable_parameters())) == len(list(pipeline.trainable_parameters()))
    assert torch.equal(loaded.run({"x": X})["y"], pipeline.run({"x": X})["y"])


def test_each_unique_block_is_one_entry_and_the_index_names_all_places(ref: str, tmp_path: Path) -> None:
    pipeline = shared_pipeline(ref)
    pipeline.save_checkpoint(tmp_path / "c")
    found = index(tmp_path / "c")
    assert found["kind"] == "pipeline" and found["format"] == "wg-checkpoint" and found["libraries"]["torch"]
    keys = found["paths"]
    assert keys["one/model"] == keys["two/model"] and keys["one/own"] == keys["one/again"] != keys["two/own"]
    assert len(found["blocks"]) == len(set(keys.values())) == 5
    assert keys["one/model"].startswith("tmp_pytest") is False and "model.safetensors" in keys["one/model"]
    assert len([f for f in files(tmp_path / "c") if f.endswith(".safetensors")]) == 3
    assert len([f for f in files(tmp_path / "c") if f.endswith(".json")]) == 3  # two memories and the index
    assert found["blocks"][keys["one/model"]]["base_ref"][2] == os.path.realpath(ref)
    assert found["blocks"][keys["one/model"]]["weights_revision"] is None
    shaken(pipeline).save_checkpoint(tmp_path / "c")
    assert len(index(tmp_path / "c")["blocks"][keys["one/model"]]["weights_revision"]) == 64


def test_two_ways_to_load_one_reference_do_not_collide(ref: str, tmp_path: Path) -> None:
    reg, pool = registry(), ModelPool()
    graph = Graph("g")
    for node_id, config in (("a", {}), ("b", {"init_seed": 1}), ("c", {"reuse": False})):
        graph.add_node("test/linear", node_id, config={"checkpoint_ref": ref, **config}, registry=reg, pool=pool)
    for node_id in ("d", "e"):
        graph.add_node(Linear(checkpoint_ref=ref), node_id)
    graph.save_checkpoint(tmp_path / "c")
    assert len(index(tmp_path / "c")["blocks"]) == 5
    before = bits(shaken(graph).state_dict())
    graph.save_checkpoint(tmp_path / "c")
    shaken(graph).load_from_checkpoint(tmp_path / "c")
    assert bits(graph.state_dict()) == before


def test_a_world_has_the_same_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # proves 02 S-1
    monkeypatch.setenv("WG_HOME", str(tmp_path / "home"))

    def world(seed: int) -> World:
        made = World.from_template("stub", world_id="doors")
        for role in ("philosopher", "creator"):
            pipeline = next(iter(made.stages[role].nodes.values())).child
            graph = next(iter(pipeline.nodes.values())).child
            graph.add_node("conditioner/toy", "extra", config={"dim": 4, "init_seed": seed}, defaults={"input": "x"})
        return made

    source, other = shaken(world(0)), world(0)
    source.save_checkpoint(tmp_path / "c")
    paths = index(tmp_path / "c")["paths"]
    assert len(paths) == 2 == len(set(paths.values())) and {p.split("/")[0] for p in paths} == {
        "philosopher",
        "creator",
    }
    other.load_from_checkpoint(tmp_path / "c")
    states = [[bits(b.state_dict()) for _, b in w.block_paths()] for w in (source, other, world(0))]
    assert states[0] == states[1] != states[2]
    source.save(tmp_path / "saved")
    loaded = World.load(tmp_path / "saved")
    assert loaded.to_config() == source.to_config()
    assert [bits(b.state_dict()) for _, b in loaded.block_paths()] == states[0]
    EndWorld("museum", {}).save(tmp_path / "museum")
    assert EndWorld.load(tmp_path / "museum").world_id == "museum"


def test_a_stage_has_the_same_doors(tmp_path: Path) -> None:
    graph = chain(("a", shaken(Linear())), ("b", Memory()), id="g")
    stage = Stage("s", reads=[1], writes=[2], inputs={"x": "intent"}, outputs={"generation_config": "y"})
    stage.add_pipeline(graph)
    stage.save_checkpoint(tmp_path / "stage")
    assert sorted(index(tmp_path / "stage")["paths"]) == ["g/g/a", "g/g/b"]
    other = Stage("s", reads=[1], writes=[2], inputs={"x": "intent"}, outputs={"generation_config": "y"})
    other.add_pipeline(chain(("a", Linear()), ("b", Memory()), id="g"))
    other.load_from_checkpoint(tmp_path / "stage")
    assert bits(other.state_dict()) == bits(stage.state_dict())


def test_owners_that_only_one_side_has_are_named_and_moved_ones_renamed(tmp_path: Path) -> None:
    # proves 01 T-43, 02 S-9
    source = shaken(chain(("a", Linear()), ("b", Outer())))
    source.save_checkpoint(tmp_path / "c")
    other = chain(("a", Linear()), ("z", Outer()))
    before = bits(other.state_dict())
    with pytest.raises(CheckpointError, match=r"lacks the blocks \['z\.net'.*unknown \['b\.net'"):
        other.load_from_checkpoint(tmp_path / "c")
    assert bits(other.state_dict()) == before
    with pytest.raises(CheckpointError, match="rename names 'q'"):
        other.load_from_checkpoint(tmp_path / "c", rename={"q": "z"})
    other.load_from_checkpoint(tmp_path / "c", rename={"b": "z"})
    assert list(bits(other.state_dict()).values()) == list(bits(source.state_dict()).values())
    third = chain(("a", Linear()), ("z", Linear()))
    report = third.load_from_checkpoint(tmp_path / "c", strict=False)
    assert report.missing == ("z",) and "b.net" in report.unexpected
    assert torch.equal(third.state_dict()["a:net.weight"], source.state_dict()["a:net.weight"])


def test_sharing_here_must_not_meet_two_states_there(tmp_path: Path) -> None:
    chain(("a", Linear()), ("b", Linear(init_seed=1))).save_checkpoint(tmp_path / "apart")
    shared = Linear(init_seed=2)
    with pytest.raises(CheckpointError, match=r"\['a', 'b'\] are one block here but 2 there"):
        chain(("a", shared), ("b", shared)).load_from_checkpoint(tmp_path / "apart")
    chain(("a", shared), ("b", shared)).save_checkpoint(tmp_path / "one")
    apart = chain(("a", Linear()), ("b", Linear()))
    apart.load_from_checkpoint(tmp_path / "one")
    assert (
        bits(apart.nodes["a"].child.state_dict())
        == bits(apart.nodes["b"].child.state_dict())
        == bits(shared.state_dict())
    )


def test_training_goes_on_from_a_checkpoint_as_if_it_never_stopped(tmp_path: Path) -> None:
    # proves 02 S-13
    def step(graph: Graph) -> None:
        optimizer = torch.optim.SGD(graph.trainable_parameters(), lr=0.1)
        optimizer.zero_grad()
        graph.run({"x": X}, training=True)["y"].square().sum().backward()
        optimizer.step()

    graph = chain(("a", Linear()), ("b", Linear(init_seed=1)))
    step(graph)
    graph.save_checkpoint(tmp_path / "c")
    step(graph)
    again = chain(("a", Linear()), ("b", Linear()))
    again.load_from_checkpoint(tmp_path / "c")
    step(again)
    assert bits(again.state_dict()) == bits(graph.state_dict())


# ---- what is broken ------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path) -> tuple[Graph, Path]:
    graph = chain(("a", Linear()), ("b", Memory()))
    return graph, graph.save_checkpoint(tmp_path / "c")


def test_damage_is_found_before_anything_changes(tmp_path: Path) -> None:
    # proves 02 S-12, U-2
    graph, path = saved(tmp_path)
    weights = next(path.rglob("*.safetensors"))
    whole, index_text = weights.read_bytes(), (path / "index.json").read_text()
    shaken(graph)
    before = bits(graph.state_dict())

    def refused(said: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=said):
            graph.load_from_checkpoint(path, **options)
        assert bits(graph.state_dict()) == before

    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("does not match its hash")
    weights.write_bytes(whole[:-9])
    refused("does not match its hash")
    refused("is no readable safetensors file", verify=False)
    weights.unlink()
    refused("is missing; the checkpoint is not whole")
    weights.write_bytes(whole)
    for old, new, said in (
        ('"schema_version": "1.1"', '"schema_version": "2.0"', "version 2.0, this engine reads 1.1"),
        ("wg-checkpoint", "other", "no checkpoint of this engine"),
        ('"file": "blocks/', '"file": "../../', "leaves its root folder"),
        ('"backend": "safetensors"', '"backend": "pickle"', "no checkpoint backend 'pickle'"),
        ("{", "", "no readable JSON"),
    ):
        (path / "index.json").write_text(index_text.replace(old, new))
        refused(said)
    (path / "index.json").write_text(index_text)
    graph.load_from_checkpoint(path)
    assert bits(graph.state_dict()) != before


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    graph, _ = saved(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match=r"empty is no checkpoint: it has no index\.json"):
        graph.load_from_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="text is no readable archive"):
        graph.load_from_checkpoint(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        graph.load_from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds a graph, not a pipeline"):
        graph.nodes["a"].child.block_type, graph.nodes["b"].child.block_type = "test/linear", "test/memory"
        graph.save(tmp_path / "saved")
        Pipeline.load(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"config\.yaml does not match its hash"):
        config = tmp_path / "saved" / "config.yaml"
        config.write_text(config.read_text() + "\n")
        Graph.load(tmp_path / "saved")
    with pytest.raises(ConfigError, match="no registered type"):
        chain(("a", Linear())).save(tmp_path / "unregistered")
    assert not (tmp_path / "unregistered").exists()


def test_a_save_never_removes_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds something else"):
        Linear().save_checkpoint(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a folder; give a file name"):
        Linear().save_checkpoint(tmp_path / "mine", format="archive")
    assert files(tmp_path / "mine") == ["thesis.txt"] and len(list(tmp_path.iterdir())) == 1


def killed_while_saving(target: Path, form: str, point: int) -> bool:
    """Save in a process of its own that dies before its `point`-th step on the disk; whether it died."""
    block = shaken(Linear())
    child = os.fork()
    if child == 0:
        left = point

        def audit(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("os.rename", "open", "os.mkdir", "os.remove", "os.rmdir") and ".tmp-" in f"{args[:2]}":
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(audit)
        block.save_checkpoint(target, format=form)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("form", ["dir", "archive"])
def test_a_kill_at_any_point_of_a_save_loses_nothing(form: str, tmp_path: Path) -> None:
    # proves 02 S-12
    target, old, new = tmp_path / "c", bits(Linear().state_dict()), bits(shaken(Linear()).state_dict())
    seen: list[str] = []
    for point in range(100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        Linear().save_checkpoint(target, format=form)
        killed = killed_while_saving(target, form, point)
        if not target.exists():  # between two renames: the former one lies beside it, and the error says so
            with pytest.raises(FileNotFoundError, match="interrupted save left the former one"):
                Linear().load_from_checkpoint(target)
            next(tmp_path.glob(".tmp-old-*")).rename(target)
            seen.append("beside")
        block = Linear(init_seed=9)
        block.load_from_checkpoint(target)
        seen.append("old" if bits(block.state_dict()) == old else "new")
        if not killed:
            break
    assert bits(block.state_dict()) == new and [p.name for p in tmp_path.iterdir()] == ["c"]
    assert len(seen) > 5 and "old" in seen
    assert form == "archive" or "beside" in seen


# ---- archives ------------------------------------------------------------------------------------------------------------


def test_archives_are_equal_for_equal_content_and_hold_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shaken(Outer()).save_checkpoint(tmp_path / name, format="archive")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    archive.unpack(tmp_path / "one", tmp_path / "folder")
    block = Outer()
    block.load_from_checkpoint(tmp_path / "folder")
    assert bits(block.state_dict()) == bits(shaken(Outer()).state_dict())


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "a//b", ".hidden", "C:evil"])
def test_names_that_leave_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x")
    info.filename = name
    with zipfile.ZipFile(tmp_path / "z", "w") as file:
        file.writestr("index.json", "{}")
        file.writestr(info, "evil")
    with pytest.raises(CheckpointError):
        archive.unpack(tmp_path / "z", tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "out" / "deep" / "index.json").exists()


def test_an_archive_with_spoilt_compression_is_refused(tmp_path: Path) -> None:
    """02 S-12: whatever way of packing whoever made it chose."""
    with zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("index.json", string.ascii_letters * 20)
    data = bytearray((tmp_path / "z").read_bytes())
    data[45:55] = b"\xff" * 10
    (tmp_path / "z").write_bytes(data)
    with pytest.raises(CheckpointError, match="no readable archive"):
        archive.unpack(tmp_path / "z", tmp_path / "out")


INDEXES: list[tuple[tuple[str, ...], Any]] = [
    (("paths",), []), (("paths", "a"), []), (("lacks",), {"a": 1}), (("blocks",), {"a": None}),
    (("blocks", "*", "tensors"), None), (("blocks", "*", "tensors"), {}), (("blocks", "*", "tensors", "aliases"), None),
    (("blocks", "*", "tensors", "file"), 5), (("blocks", "*", "tensors", "file"), "a\0b"),
    (("blocks", "*", "tensors", "file"), "x" * 300),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), INDEXES)
@pytest.mark.parametrize("verify", [True, False])
def test_an_index_of_another_form_is_refused(place: tuple[str, ...], value: Any, verify: bool, tmp_path: Path) -> None:
    """02 S-12, U-2: a named error before anything changes, not what Python says of it."""
    graph = chain(("a", Linear()))
    path = graph.save_checkpoint(tmp_path / "c")
    whole = at = index(path)
    for name in place[:-1]:
        at = at[next(iter(at)) if name == "*" else name]
    at[place[-1]] = value
    (path / "index.json").write_text(json.dumps(whole))
    before = bits(shaken(graph).state_dict())
    with pytest.raises(CheckpointError):
        graph.load_from_checkpoint(path, verify=verify)
    assert bits(graph.state_dict()) == before


def test_links_doubles_and_bombs_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link", "w") as file:
        file.writestr(link, "/etc/passwd")
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("index.json", b"\0" * (archive.FREE_SIZE + 1))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "double", "w") as file:
        file.writestr("a", "1")
        file.writestr("a", "2")
    for name, said in (("link", "no plain file"), ("bomb", "would grow"), ("double", "a name twice")):
        with pytest.raises(CheckpointError, match=said):
            archive.unpack(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    block = shaken(Linear())
    block.save_checkpoint(tmp_path / "c", format="archive")
    data = (tmp_path / "c").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="no readable archive"):
            Linear().load_from_checkpoint(tmp_path / "cut")

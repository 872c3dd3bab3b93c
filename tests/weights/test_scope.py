"""Checkpoints of a part of the state, and blocks that are shared: what is not asked for does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Linear, Memory, Net, bits, chain, registry, shaken

from wg_core import Graph, ModelPool, Pipeline
from wg_core.errors import CheckpointError, StateDictError
from wg_core.weights.checkpoint import CHECKPOINT

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def index(path: Path) -> dict[str, Any]:
    return json.loads((path / "index.json").read_text())


# ---- scope -------------------------------------------------------------------------------------------------------------


def half_frozen(seed: int = 0) -> Graph:
    """`a` rests, of `b` the head learns, `c` is no module."""
    graph = chain(("a", Linear(init_seed=seed)), ("b", Net(init_seed=seed)), ("c", Memory()))
    graph.set_trainable("a", False)
    graph.nodes["b"].child.freeze("enc.*")
    return graph


@pytest.mark.parametrize("form", ["dir", "archive"])
def test_what_is_trained_is_kept_and_the_rest_is_named(form: str, tmp_path: Path) -> None:
    """02 T-10: a partial checkpoint says what it lacks; what it lacks stays as it is."""
    source = shaken(half_frozen())
    source.save_checkpoint(tmp_path / "c", scope="trainable", format=form)
    if form == "dir":
        found = index(tmp_path / "c")
        assert found["scope"] == "trainable" and set(found["paths"]) == {"b"}
        assert found["lacks"]["a"] == ["net.weight"] and found["lacks"]["c"] == ["count", "notes"]
        assert found["lacks"]["b"] == ["enc.0.weight", "enc.0.bias", "enc.1.weight", "enc.1.bias"]  # running statistics stay
    other = half_frozen(seed=3)
    before = bits(other.state_dict())
    report = other.load_from_checkpoint(tmp_path / "c")
    after, wanted = bits(other.state_dict()), bits(source.state_dict())
    stored = {"b:head.weight", "b:head.bias", "b:enc.1.running_mean", "b:enc.1.running_var", "b:enc.1.num_batches_tracked"}
    assert {k for k in after if after[k] == wanted[k]} >= stored
    assert {k: v for k, v in after.items() if k not in stored} == {k: v for k, v in before.items() if k not in stored}
    assert set(report.missing) == {"a", "c", *(f"b:{k}" for k in ("enc.0.weight", "enc.0.bias", "enc.1.weight", "enc.1.bias"))}


def test_a_partial_checkpoint_asks_for_no_weights_that_it_lacks(tmp_path: Path) -> None:
    half_frozen().save_checkpoint(tmp_path / "c", scope="trainable")
    other = half_frozen()
    other.nodes["b"].child.unload()
    other.load_from_checkpoint(tmp_path / "c")
    assert not other.nodes["a"].child.materialized and other.nodes["b"].child.materialized


def test_what_a_partial_checkpoint_lacks_without_saying_so_is_an_error(tmp_path: Path) -> None:
    """02 S-9, T-10."""
    half_frozen().save_checkpoint(tmp_path / "c", scope="trainable")
    text = (tmp_path / "c" / "index.json").read_text()
    more = chain(("a", Linear()), ("b", Net()), ("c", Memory()), ("d", Linear()))
    with pytest.raises(CheckpointError, match=r"lacks the blocks \['d'\]"):
        more.load_from_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "index.json").write_text(text.replace('"enc.1.bias"', '"other"'))
    with pytest.raises(StateDictError, match=r"missing \['b:enc\.1\.bias'\]"):
        half_frozen().load_from_checkpoint(tmp_path / "c")
    renamed = chain(("a", Linear()), ("z", Net()), ("c", Memory()))
    (tmp_path / "c" / "index.json").write_text(text)
    renamed.load_from_checkpoint(tmp_path / "c", rename={"b": "z"})


def test_adapters_alone(tmp_path: Path) -> None:
    """02 T-10."""
    source, other = adapted(), adapted()
    shaken(source)
    source.save_checkpoint(tmp_path / "c", scope="adapters")
    assert set(index(tmp_path / "c")["paths"]) == {"lora"}
    before = bits(other.nodes["a"].child.state_dict())
    report = other.load_from_checkpoint(tmp_path / "c")
    assert report.missing == ("a",)
    assert bits(other.nodes["lora"].child.state_dict()) == bits(source.nodes["lora"].child.state_dict())
    assert bits(other.nodes["a"].child.state_dict()) == before
    with pytest.raises(CheckpointError, match="scope 'lora' is none of all, trainable, adapters"):
        source.save_checkpoint(tmp_path / "d", scope="lora")


def adapted() -> Graph:
    graph = chain(("a", Linear()))
    graph.add_node("adapter/lora", "lora", config={"target": "a", "rank": 1, "modules": ["net"]})
    return graph


@pytest.mark.parametrize("scope", ["adapters", "trainable"])
def test_what_was_learned_over_a_trained_model_is_not_loaded_over_its_reference(
    scope: str, ref: str, tmp_path: Path
) -> None:
    """01 E-2: a partial checkpoint says the revision of trained weights that it leaves out; a load compares it."""

    def graph() -> Graph:
        made = Graph("g")
        made.add_node("test/linear", "m", config={"checkpoint_ref": ref}, registry=registry(), pool=ModelPool())
        made.add_node("adapter/lora", "lora", config={"target": "m", "rank": 1, "modules": ["net"]})
        return made

    plain = graph()
    plain.nodes["m"].child.materialize()
    plain.set_trainable("m", False)
    shaken(plain.nodes["lora"].child)
    plain.save_checkpoint(tmp_path / "plain", scope=scope)
    assert index(tmp_path / "plain")["weights_revisions"] == {}
    graph().load_from_checkpoint(tmp_path / "plain")
    tuned = graph()
    shaken(tuned)
    tuned.save_checkpoint(tmp_path / "tuned")
    tuned.set_trainable("m", False)
    tuned.save_checkpoint(tmp_path / "part", scope=scope)
    revision = index(tmp_path / "part")["weights_revisions"]["m"]
    assert revision["names"] == ["net.weight"] and len(revision["sha256"]) == 64
    other = graph()
    before = bits(other.state_dict())
    with pytest.raises(CheckpointError, match=rf"m had been trained before.*weights_revision is {revision['sha256']}.*scope='all'"):
        other.load_from_checkpoint(tmp_path / "part")
    assert bits(other.state_dict()) == before
    other.load_from_checkpoint(tmp_path / "tuned")
    other.load_from_checkpoint(tmp_path / "part")
    assert bits(other.state_dict()) == bits(tuned.state_dict())


# ---- older checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_first_version_keeps_loading(tmp_path: Path) -> None:
    """02 S-10: before scopes, every checkpoint was whole."""
    source = shaken(chain(("a", Linear()), ("b", Memory())))
    source.save_checkpoint(tmp_path / "c")
    old = index(tmp_path / "c")
    assert old["schema_version"] == CHECKPOINT.current == "1.1"
    del old["scope"], old["lacks"]
    (tmp_path / "c" / "index.json").write_text(json.dumps({**old, "schema_version": "1.0"}))
    other = chain(("a", Linear()), ("b", Memory()))
    other.load_from_checkpoint(tmp_path / "c")
    assert bits(other.state_dict()) == bits(source.state_dict())
    (tmp_path / "c" / "index.json").write_text(json.dumps({**old, "schema_version": "1.1"}))
    with pytest.raises(CheckpointError, match="its index has no lacks"):
        other.load_from_checkpoint(tmp_path / "c")


# ---- shared blocks -----------------------------------------------------------------------------------------------------


def with_model(pool: ModelPool, id: str, ref: str, **config: Any) -> Graph:
    graph = Graph(id)
    for node_id in ("m", "again"):
        graph.add_node("test/linear", node_id, config={"checkpoint_ref": ref, **config}, registry=registry(), pool=pool)
    graph.add_edge("m", "y", "again", "x")
    graph.expose_input("m", "x", "x")
    graph.expose_output("again", "y", "y")
    return graph


@pytest.fixture
def ref(tmp_path: Path) -> str:
    from safetensors.torch import save_file

    save_file(Linear().state_dict(), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


@pytest.fixture
def tuned(ref: str, tmp_path: Path) -> Path:
    """The checkpoint of a graph whose model was trained on."""
    return shaken(with_model(ModelPool(), "one", ref)).save_checkpoint(tmp_path / "tuned")


def test_a_model_that_others_hold_is_not_loaded_over(ref: str, tuned: Path) -> None:
    """02 S-11, P-4: by default an error, before anything changes."""
    pool = ModelPool()
    one, two = with_model(pool, "one", ref), with_model(pool, "two", ref)
    for _ in range(2):  # first without weights in memory, then with
        with pytest.raises(CheckpointError, match=r"share the blocks m \(held by graph 'two'\).*on_shared='fork'"):
            one.load_from_checkpoint(tuned)
        before = bits(two.state_dict())
    assert bits(two.state_dict()) == before and one.nodes["m"].child is two.nodes["m"].child
    with pytest.raises(CheckpointError, match="on_shared is error or fork, not 'overwrite'"):
        one.load_from_checkpoint(tuned, on_shared="overwrite")
    two.remove_node("m")
    two.remove_node("again")
    one.load_from_checkpoint(tuned)


def test_who_is_loaded_as_a_whole_may_share_within(ref: str, tuned: Path, tmp_path: Path) -> None:
    """02 S-11: holders inside the entity are no others."""
    pool = ModelPool()
    pipeline = Pipeline("p")
    for name in ("one", "two"):
        pipeline.add_graph(with_model(pool, name, ref))
    pipeline.save_checkpoint(tmp_path / "p")
    pipeline.load_from_checkpoint(tmp_path / "p")
    with pytest.raises(CheckpointError, match="held by graph 'two'"):
        pipeline.nodes["one"].child.load_from_checkpoint(tuned)


def test_equal_weights_are_no_conflict(ref: str, tmp_path: Path) -> None:
    pool = ModelPool()
    one, two = with_model(pool, "one", ref), with_model(pool, "two", ref)
    one.save_checkpoint(tmp_path / "same")
    one.load_from_checkpoint(tmp_path / "same", on_shared="fork")
    assert one.nodes["m"].child is two.nodes["m"].child and not one.nodes["m"].child.weights_changed()


def test_a_fork_has_the_loaded_weights_in_all_its_places(ref: str, tuned: Path, tmp_path: Path) -> None:
    """02 S-11: a copy of its own here, which no pool takes for the base, and which is saved and read as what it is."""
    pool = ModelPool()
    one, two = with_model(pool, "one", ref), with_model(pool, "two", ref)
    before = bits(two.state_dict())
    one.load_from_checkpoint(tuned, on_shared="fork")
    fork = one.nodes["m"].child
    assert fork is one.nodes["again"].child is not two.nodes["m"].child
    assert bits(two.state_dict()) == before != bits(one.state_dict())
    assert fork.model_ref() != two.nodes["m"].child.model_ref() and fork.model_ref()[2] == two.nodes["m"].child.model_ref()[2]
    pipeline = Pipeline("p")
    pipeline.add_graph(one)
    pipeline.add_graph(two)
    assert pipeline.validate(deep=True).is_valid
    pipeline.save(tmp_path / "p")
    found = index(tmp_path / "p" / "checkpoint")
    assert len(found["blocks"]) == 2 and {b["base_ref"][2] for b in found["blocks"].values()} == {ref}
    again = Pipeline.load(tmp_path / "p", registry=registry())
    assert bits(again.state_dict()) == bits(pipeline.state_dict())
    models = [again.nodes[g].child.nodes[n].child for g in ("one", "two") for n in ("m", "again")]
    assert models[0] is models[1] is not models[2] is models[3]
    assert torch.equal(again.nodes["one"].child.run({"x": X})["y"], one.run({"x": X})["y"])


def test_a_fork_that_does_not_fit_changes_nothing(ref: str, tmp_path: Path) -> None:
    pool = ModelPool()
    one, two = with_model(pool, "one", ref), with_model(pool, "two", ref)
    chain(("m", Linear(width=4))).save_checkpoint(tmp_path / "wide")
    with pytest.raises(StateDictError, match="not Tensor"):
        one.load_from_checkpoint(tmp_path / "wide", on_shared="fork")
    assert one.nodes["m"].child is two.nodes["m"].child


def test_a_saved_fine_tune_is_not_taken_for_its_base(ref: str, tmp_path: Path) -> None:
    """02 S-11: it keeps the reference of its base and a hash of its content; the pool serves others a fresh base."""
    pool = ModelPool()
    shaken(with_model(ModelPool(), "one", ref)).save(tmp_path / "one")
    loaded = Graph.load(tmp_path / "one", registry=registry(), pool=pool)
    other = with_model(pool, "two", ref)
    assert other.nodes["m"].child is not loaded.nodes["m"].child
    assert bits(other.state_dict()) == bits({"m:net.weight": Linear().state_dict()["net.weight"]})
    entry = next(iter(index(tmp_path / "one" / "checkpoint")["blocks"].values()))
    assert entry["base_ref"][2] == ref and len(entry["weights_revision"]) == len(entry["tensors"]["sha256"]) == 64
    base = with_model(pool, "three", ref)
    with pytest.raises(CheckpointError, match="held by graph 't"):
        Graph.load(tmp_path / "one", registry=registry(), pool=pool)
    again = Graph.load(tmp_path / "one", registry=registry(), pool=pool, on_shared="fork")
    assert bits(again.state_dict()) == bits(loaded.state_dict()) != bits(base.state_dict())


def test_an_adapter_lets_go_only_when_no_copy_has_it() -> None:
    """01 E-6: blocks are shared with copies, adapters too."""
    graph = adapted()
    shaken(graph)
    wanted = graph.run({"x": X})["y"]
    made = graph.copy()
    made.remove_node("lora")
    assert torch.equal(graph.run({"x": X})["y"], wanted) and not torch.equal(made.run({"x": X})["y"], wanted)

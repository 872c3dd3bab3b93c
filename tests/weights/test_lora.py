"""Low-rank adapters: they learn alone, are saved alone, and work where they are told to and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Linear, Memory, Net, Odd, bits, chain, registry, shaken
from safetensors.torch import save_file

from wg_blocks.lora import LoRA
from wg_core import Graph, ModelPool, ValidationError
from wg_core.errors import AdapterError, ConfigError, NodeError, NodeExecutionError

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def learned(adapter: LoRA) -> LoRA:
    """The adapter with numbers that change something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return adapter


def run(graph: Graph, **options: Any) -> Any:
    return graph.run({"x": X}, **options)["y"]


def test_a_new_one_changes_nothing_then_learns_alone() -> None:
    # proves 01 A-13, T-24
    base, adapter = Net(), LoRA(target="net", modules=["enc.*"], rank=2)
    graph = chain(("net", base))
    before = run(graph)
    graph.add_node(adapter, "style")
    assert torch.equal(run(graph), before)
    graph.set_trainable("net", False)
    weights, hash_before = bits(base.state_dict()), base.weight_hash()
    names = [n for n, _ in graph.named_trainable_parameters()]
    assert names == ["style:enc__0.lora_A.lora.weight", "style:enc__0.lora_B.lora.weight"]
    optimizer = torch.optim.SGD(graph.trainable_parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        run(graph, training=True).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(run(graph), before)
    assert bits(base.state_dict()) == weights and base.weight_hash() == hash_before and not base.weights_changed()
    assert all(p.grad is None and p.requires_grad for _, p in base.named_parameters())
    graph.remove_node("style")
    assert torch.equal(run(graph), before)


def test_what_it_adds_is_the_formula() -> None:
    base, adapter = Linear(), LoRA(target="net", rank=2, alpha=6)
    graph = chain(("net", base))
    graph.add_node(adapter, "style")
    learned(adapter)
    state = adapter.state_dict()
    a, b = state["net.lora_A.lora.weight"], state["net.lora_B.lora.weight"]
    torch.testing.assert_close(run(graph), X @ base.modules["net"].weight.t() + 6 / 2 * X @ a.t() @ b.t())


def test_embeddings_and_convolutions_can_be_adapted() -> None:
    graph = Graph("g")
    graph.add_node("conditioner/toy", "txt", config={"dim": 8})
    graph.add_node("backbone/toy", "net", config={"condition_dim": 8})
    for node_id in ("txt", "net"):
        graph.add_node("adapter/lora", f"on_{node_id}", config={"target": node_id})
    graph.expose_input("txt", "input", "text")
    graph.expose_input("net", "latent", "latent")
    graph.expose_input("net", "timestep", "timestep")
    graph.expose_output("net", "pred", "pred")
    inputs = {"text": "a", "latent": torch.ones(1, 4, 4, 4), "timestep": 0.5}
    plain = graph.run(inputs)["pred"]
    seen = {float(plain.sum())}
    for node_id, slots in (("txt", ["out", "tokens"]), ("net", ["condition", "head", "mix", "stem", "time"])):
        adapter = graph.nodes[f"on_{node_id}"].child
        assert sorted(adapter.modules) == slots == graph.nodes[node_id].child.adapter_slots()
        learned(adapter)
        seen.add(float(graph.run(inputs)["pred"].sum()))
    assert len(seen) == 3


def test_it_is_saved_apart_from_its_base(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Graph, LoRA]:
        graph, adapter = chain(("net", Linear())), LoRA(target="net", rank=2, init_seed=seed)
        graph.add_node(adapter, "style")
        return graph, adapter

    graph, adapter = made(0)
    learned(adapter)
    adapter.save_checkpoint(tmp_path / "style")
    assert [f.stat().st_size < 1000 for f in tmp_path.rglob("*.safetensors")] == [True]
    other, fresh = made(1)
    assert not torch.equal(run(other), run(graph))
    fresh.load_from_checkpoint(tmp_path / "style")
    assert torch.equal(run(other), run(graph))


def test_a_graph_with_adapters_comes_back_whole_without_the_reference(tmp_path: Path) -> None:
    reg, ref = registry(), tmp_path / "model.safetensors"
    reg.register("adapter/lora", LoRA)
    save_file(shaken(Linear()).state_dict(), ref)
    graph = Graph("g")
    graph.add_node("adapter/lora", "style", config={"target": "net", "when": {"node_id": "net"}}, registry=reg)
    graph.add_node("test/linear", "net", config={"checkpoint_ref": str(ref)}, registry=reg, pool=ModelPool())
    graph.expose_input("net", "x", "x")
    graph.expose_output("net", "y", "y")
    learned(graph.nodes["style"].child)
    wanted = run(graph)
    graph.save(tmp_path / "saved")
    ref.unlink()
    loaded = Graph.load(tmp_path / "saved", registry=reg)
    assert torch.equal(run(loaded), wanted) and loaded.to_config() == graph.to_config()


def test_loading_an_adapter_alone_reads_the_base_from_its_reference(tmp_path: Path) -> None:
    ref, source = tmp_path / "model.safetensors", shaken(Linear())
    save_file(source.state_dict(), ref)
    graph = chain(("net", Linear(checkpoint_ref=str(ref))))
    graph.add_node(LoRA(target="net"), "style")
    by_hand = LoRA(target="net")
    by_hand.attach(source)
    by_hand.save_checkpoint(tmp_path / "style")
    by_hand.detach()
    graph.nodes["style"].child.load_from_checkpoint(tmp_path / "style")
    assert bits(graph.nodes["net"].child.state_dict()) == bits(source.state_dict())


def test_two_on_one_shared_block_switch_by_context() -> None:
    # proves 01 A-13, 02 T-9
    base = Linear()
    graph = chain(("a", base), ("b", base))
    for node_id, seed in (("a", 1), ("b", 2)):
        adapter = LoRA(target="a", when={"node_id": node_id}, init_seed=seed)
        graph.add_node(adapter, f"on_{node_id}")
        learned(adapter)
        with torch.no_grad():
            for _, parameter in adapter.named_parameters():
                parameter.mul_(seed)
    w = base.modules["net"].weight

    def with_delta(node_id: str) -> Any:
        state = graph.nodes[f"on_{node_id}"].child.state_dict()
        return w + state["net.lora_B.lora.weight"] @ state["net.lora_A.lora.weight"]

    torch.testing.assert_close(run(graph), X @ with_delta("a").t() @ with_delta("b").t())
    graph.remove_node("on_b")
    torch.testing.assert_close(run(graph), X @ with_delta("a").t() @ w.t())


def test_without_a_condition_it_works_in_all_uses_of_its_own_graph_only() -> None:
    base, adapter = Linear(), LoRA(target="a")
    ours, theirs = chain(("a", base), ("b", base)), chain(("net", base))
    plain = base.run({"x": X})["y"]
    ours.add_node(adapter, "style")
    learned(adapter)
    assert torch.equal(run(theirs), plain) and torch.equal(base.run({"x": X})["y"], plain)
    state = adapter.state_dict()
    whole = base.modules["net"].weight + state["net.lora_B.lora.weight"] @ state["net.lora_A.lora.weight"]
    torch.testing.assert_close(run(ours), X @ whole.t() @ whole.t())


def test_by_hand_it_works_in_every_call_until_it_lets_go() -> None:
    base, adapter = Linear(), LoRA(target="whatever")
    plain = base.run({"x": X})["y"]
    with pytest.raises(AdapterError, match="attached to nothing"):
        adapter.state_dict()
    adapter.attach(base)
    adapter.attach(base)
    learned(adapter)
    once = base.run({"x": X})["y"]
    assert not torch.allclose(once, plain) and torch.equal(run(chain(("net", base))), once)
    kept = bits(adapter.state_dict())
    adapter.detach()
    adapter.detach()
    assert torch.equal(base.run({"x": X})["y"], plain)
    adapter.attach(base)
    assert bits(adapter.state_dict()) == kept and torch.equal(base.run({"x": X})["y"], once)
    with pytest.raises(AdapterError, match="was made for"):
        adapter.attach(shaken(Odd()))


@pytest.mark.parametrize("order", [("style", "net"), ("net", "style")])
def test_it_hangs_on_as_soon_as_both_are_there_and_loads_nothing(order: tuple[str, str]) -> None:
    builds = Net.builds
    parts: dict[str, Any] = {"net": Net(), "style": LoRA(target="net")}
    graph = Graph("g")
    for node_id in order:
        graph.add_node(parts[node_id], node_id)
    assert parts["style"].leans_on is parts["net"] and Net.builds == builds
    graph.validate()
    assert Net.builds == builds
    other = Net(init_seed=1)
    graph.replace_block("net", other)
    assert parts["style"].leans_on is other and parts["net"].adapters == []
    graph.remove_node("net")
    assert parts["style"].leans_on is None
    with pytest.raises(ValidationError, match=r"g/style.*target 'net' is no node"):
        graph.validate()


def test_its_target_keeps_its_name() -> None:
    graph = chain(("net", Net()))
    graph.add_node(LoRA(target="net"), "style")
    with pytest.raises(NodeError, match="'style'"):
        graph.rename_node("net", "other")
    graph.rename_node("style", "look")
    assert list(graph.nodes) == ["net", "look"]


def test_a_target_without_weights_is_refused_and_the_graph_is_as_before() -> None:
    graph = chain(("api", Memory()))
    version, config = graph.version, list(graph.nodes)
    with pytest.raises(AdapterError, match=r"target 'api' is 'Memory', which has no weights to adapt"):
        graph.add_node(LoRA(target="api"), "style")
    assert (graph.version, list(graph.nodes)) == (version, config)
    graph = chain(("net", Net()))
    graph.add_node(LoRA(target="net", modules=["attn.*"]), "style")
    with pytest.raises(NodeExecutionError, match=r"no slot that matches \['attn\.\*'\]"):
        run(graph)
    for wrong, said in (
        ({"rank": 0}, "rank"),
        ({"modules": []}, "modules"),
        ({"when": {"nod_id": "a"}}, "did you mean 'node_id'"),
    ):
        with pytest.raises(ConfigError, match=said):
            LoRA(target="net", **wrong)


def test_a_target_that_is_closed_and_built_again_is_adapted_again() -> None:
    base, adapter = Linear(), LoRA(target="net")
    graph = chain(("net", base))
    graph.add_node(adapter, "style")
    learned(adapter)
    adapted = run(graph)
    base.close()
    assert torch.equal(run(graph), adapted)


def test_a_condition_may_name_the_iteration() -> None:
    base = Linear()
    graph = chain(("net", base))
    graph.add_edge("net", "y", "net", "x", carry=True)
    adapter = LoRA(target="net", when={"iteration": "0", "graph_id": "ch*"})
    graph.add_node(adapter, "style")
    learned(adapter)
    state, w = adapter.state_dict(), base.modules["net"].weight
    first = w + state["net.lora_B.lora.weight"] @ state["net.lora_A.lora.weight"]
    torch.testing.assert_close(run(graph, num_loop_steps=3), X @ first.t() @ w.t() @ w.t())

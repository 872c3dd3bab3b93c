"""Blocks with torch modules: built late, reproducible, frozen for real, known to the pool when they change."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Linear, Net, Odd, Outer, bits, chain, registry, shaken
from safetensors.torch import save_file

from wg_core import Block, Graph, ModelPool
from wg_core.errors import CheckpointError, ConfigError, MissingModelError
from wg_core.weights.tree import count_parameters, iter_parameters, sub_paths

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def step(block: Any) -> None:
    """One optimizer step on all that learns."""
    optimizer = torch.optim.SGD(block.trainable_parameters(), lr=0.5)
    block.run({"x": X})["y"].square().sum().backward()
    optimizer.step()


def test_the_core_loads_without_torch_and_with_the_weights_floor() -> None:
    code = (
        "import sys, wg_core, wg_core.weights.module, wg_core.weights.checkpoint, wg_core.weights.lora; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_building_is_late_equal_and_leaves_the_global_generator_alone() -> None:
    before, builds = torch.get_rng_state(), Net.builds
    one, two, other = Net(), Net(), Net(init_seed=1)
    one.train().eval().to("cpu")
    assert Net.builds == builds and not one.materialized
    assert bits(one.state_dict()) == bits(two.state_dict()) != bits(other.state_dict())
    assert Net.builds == builds + 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_reference_is_read_at_first_use_and_not_before(tmp_path: Path) -> None:
    # proves 01 T-40
    block = Net(checkpoint_ref=str(tmp_path / "net.safetensors"))
    graph = chain(("net", block))
    graph.validate()
    graph.dry_run()
    with pytest.raises(MissingModelError, match=r"net\.safetensors.*leave checkpoint_ref out"):
        block.materialize()
    assert not block.materialized
    source = shaken(Net())
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "net.safetensors")
    assert bits(block.state_dict()) == bits(source.state_dict())
    source.save_checkpoint(tmp_path / "folder")
    assert bits(Net(checkpoint_ref=str(tmp_path / "folder")).state_dict()) == bits(source.state_dict())
    misfit = Linear(checkpoint_ref=str(tmp_path / "net.safetensors"))
    with pytest.raises(CheckpointError, match=r"does not fit block.*enc\.0\.weight"):
        misfit.materialize()
    assert not misfit.materialized


def test_one_reference_is_one_object_read_once_and_optimised_once(tmp_path: Path) -> None:
    # proves 01 A-10, T-39
    reg, pool, ref = registry(), ModelPool(), str(tmp_path / "net.safetensors")
    save_file(shaken(Linear()).state_dict(), ref)
    graph = Graph("two")
    for node_id, config in (
        ("a", {}), ("b", {}), ("own", {"reuse": False}), ("seeded", {"init_seed": 4}),
    ):  # fmt: skip
        config = {"checkpoint_ref": ref, **config}
        graph.add_node("test/linear", node_id, config=config, registry=reg, pool=pool)
    blocks = {n: graph.nodes[n].child for n in graph.nodes}
    assert blocks["a"] is blocks["b"]
    assert len({id(b) for b in blocks.values()}) == 3
    assert len(graph.trainable_parameters()) == 3
    again = Graph.from_config(graph.to_config(), registry=reg, pool=ModelPool())
    assert again.nodes["a"].child is again.nodes["b"].child is not again.nodes["own"].child


def test_a_changed_block_is_never_served_as_its_reference_again(tmp_path: Path) -> None:
    # proves 01 E-2
    reg, pool, ref = registry(), ModelPool(), str(tmp_path / "net.safetensors")
    save_file(Linear().state_dict(), ref)
    config = {"block_type": "test/linear", "config": {"checkpoint_ref": ref}}
    trained = reg.build(config, pool=pool)
    pristine = bits(trained.state_dict())
    trained.run({"x": X})
    trained.train().eval().to("cpu")
    assert reg.build(config, pool=pool) is trained and not trained.weights_changed()
    old_hash = trained.weight_hash()
    step(trained)
    assert trained.weights_changed() and trained.weight_hash() != old_hash
    fresh = reg.build(config, pool=pool)
    assert fresh is not trained
    assert bits(fresh.state_dict()) == pristine != bits(trained.state_dict())
    assert fresh.weight_hash() == old_hash
    assert reg.build(config, pool=pool) is fresh


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_every_way_to_step_is_noticed(optimizer: Any, foreach: bool) -> None:
    block = Linear()
    block.run({"x": X})["y"].sum().backward()
    optimizer(block.trainable_parameters(), lr=0.1, foreach=foreach).step()
    assert block.weights_changed()


def test_freezing_stops_updates_and_unfreezing_restores() -> None:
    # proves 01 A-6, F-26
    block: Block = Outer()
    names = [n for n, _ in block.named_trainable_parameters()]
    always_off = dict(block.named_parameters())["net.head.bias"]
    always_off.requires_grad_(False)
    block.train()
    block.freeze("deep.net.*").freeze(["net.enc.*"])
    left = [n for n, _ in block.named_trainable_parameters()]
    assert left == ["net.head.weight"]
    before = bits(block.state_dict())
    step(block)
    after = bits(block.state_dict())
    assert {k for k in after if after[k] != before[k]} == {"net.head.weight"}  # running statistics rest as well
    block.freeze()
    assert block.frozen and block.trainable_parameters() == []
    block.unfreeze()
    assert [n for n, _ in block.named_trainable_parameters()] == [n for n in names if n != "net.head.bias"]
    assert not always_off.requires_grad and not block.frozen
    step(block)
    moved = bits(block.state_dict())
    assert moved["net.enc.1.running_mean"] != after["net.enc.1.running_mean"]  # in training mode again


def test_the_frozen_part_stays_in_evaluation_mode() -> None:
    block = Net().freeze("enc.*")
    block.train()
    assert not block.modules["enc"].training and not block.modules["enc"][2].training
    assert block.modules["head"].training
    block.unfreeze("enc.*")
    assert block.modules["enc"][2].training
    block.eval()
    assert not block.modules["head"].training


def test_freezing_says_what_matches_nothing_and_leaves_blocks_without_weights_alone() -> None:
    with pytest.raises(ConfigError, match=r"no parameter matches \['encoder\.\*'\]"):
        Net().freeze("encoder.*")
    plain = Block()
    assert plain.freeze().unfreeze("x*") is plain and not plain.frozen


def test_each_parameter_is_met_once() -> None:
    tied = Odd()
    names = [n for n, _ in iter_parameters(sub_paths("odd", tied))]
    assert names == ["odd:odd.turned", "odd:odd.brief", "odd:odd.scalar", "odd:odd.embed.weight"]
    assert count_parameters(sub_paths("odd", tied)) == 6 + 2 + 1 + 20
    shared = Linear()
    assert [n for n, _ in iter_parameters([("a", shared), ("b", shared)])] == ["a:net.weight"]
    assert len(chain(("a", shared), ("b", shared)).trainable_parameters()) == 1


def test_place_and_kind_are_kept_until_the_weights_are_there() -> None:
    block = Outer().to(dtype="bfloat16")
    assert block.parts["deep"].parts["net"].modules["head"].weight.dtype is torch.bfloat16
    built = Net()
    built.materialize()
    built.to("cpu", torch.float64)
    assert built.modules["head"].weight.dtype is torch.float64 and not built.weights_changed()


def test_slots_are_the_layers_that_adapters_can_hang_on() -> None:
    assert Net().adapter_slots() == ["enc.0", "head"]
    assert Odd().adapter_slots() == ["odd.embed", "odd.out"]
    assert Block().adapter_slots() == []


def test_closing_frees_and_the_next_use_builds_again_as_it_was() -> None:
    block = Net().freeze("enc.*")
    first = block.run({"x": X})["y"]
    block.close()
    assert not block.materialized
    assert torch.equal(block.run({"x": X})["y"], first)
    assert [n for n, _ in block.named_trainable_parameters()] == ["head.weight", "head.bias"]
    block.unfreeze()
    assert len(block.trainable_parameters()) == 6


class Slow(Net):
    """Takes its time to read its weights, and says when it begins."""

    reading = threading.Event()

    def read_reference(self, reference: str) -> Any:
        Slow.reading.set()
        time.sleep(0.05)
        return super().read_reference(reference)


def test_many_first_users_build_it_once_and_wait_for_its_weights(tmp_path: Path) -> None:
    source = shaken(Net())
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    block, before = Slow(checkpoint_ref=str(tmp_path / "net.safetensors")), Net.builds
    found: list[Any] = []

    def use(late: bool) -> None:
        if late:
            Slow.reading.wait(10)
        found.append(block.run({"x": X})["y"])

    threads = [threading.Thread(target=use, args=(i > 3,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Net.builds == before + 1 and len(found) == 8
    assert all(torch.equal(y, source.run({"x": X})["y"]) for y in found)

"""LoRA worlds: one base, many sets of adapters, each at work in the calls of its own world and stage."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from wg_blocks.llm_local import CausalLM
from wg_core import ModelPool, World
from wg_core.assembly.loader import dump_yaml
from wg_core.errors import AdapterError, ConfigError, MissingModelError, NodeError, NodeExecutionError
from wg_core.levels.adapter_sets import report
from wg_core.levels.lora_world import LoraWorld, lora_world
from wg_core.levels.training import calling
from wg_core.weights.lora import working_on
from wg_core.weights.training_config import TrainingConfig
from worlds import AT, base_world, block_at, config, flow_of, teach, texts


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.getbasetemp() / "worlds"
    made.mkdir(exist_ok=True)
    return made


@pytest.fixture
def base(folder: Path, tmp_path: Path) -> World:
    return base_world(folder, tmp_path / "snapshots")


def test_a_new_one_is_its_base_exactly(base: World) -> None:
    """03 L-2, 01 A-13: adapters that have learned nothing change nothing, bit by bit."""
    before = flow_of(base)
    world = lora_world(base, "noir", rank=2)
    assert flow_of(world).state == before.state
    model = block_at(base, AT["tell"])
    ids = torch.tensor([[1, 5, 7]])
    plain = model.modules["lm"](ids).logits
    assert len(world.adapters()) == 1 and torch.equal(model.modules["lm"](ids).logits, plain)


def test_base_and_two_worlds_side_by_side_on_one_model(base: World) -> None:
    """03 L-2, L-3: one instance of the model; base, A and B in turn and back give what each gives alone."""
    alone = texts(base)
    a, b = lora_world(base, "noir"), lora_world(base, "calm")
    teach(a, 1)
    teach(b, 2)
    first, other = texts(a), texts(b)
    assert len({alone, first, other}) == 3
    assert [texts(w) for w in (a, base, b, a, base)] == [first, alone, other, first, alone]
    models = {id(x) for w in (base, a, b) for x in w.iter_blocks() if isinstance(x, CausalLM)}
    assert len(models) == 1 and len(block_at(base, AT["tell"]).adapters) == 2


def test_the_benchmark_tells_worlds_apart_whose_texts_agree(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """03 L-3: after one word the texts of weak adapters are the same, what the worlds think of an answer is not."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from lora_worlds import measure  # type: ignore[import-not-found]

    found = measure(dump_yaml(config(folder, "measured"), tmp_path / "measured.yaml"), rank=2, tokens=1)
    assert found["world"] == "measured" and found["memory_ratio"] > 0


def test_worlds_in_threads_do_not_meet(base: World) -> None:
    """03 L-3: which adapter works is seen from the call, so threads need not wait for each other's world."""
    worlds = [base, lora_world(base, "noir"), lora_world(base, "calm")]
    for seed, world in enumerate(worlds[1:], 1):
        teach(world, seed)
    wanted = [texts(w) for w in worlds]
    got: dict[int, list[Any]] = {i: [] for i in range(3)}
    threads = [threading.Thread(target=lambda i=i: got[i].extend(texts(worlds[i]) for _ in range(3))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: [wanted[i]] * 3 for i in range(3)}


def test_stages_of_one_world_differ_on_one_model(base: World) -> None:
    """03 L-3, 02 T-9, 04 X-4: one adapter for all uses of a model, one for each stage, or for a chosen stage only."""
    tell, judge = texts(base)
    whole = lora_world(base, "whole")
    assert list(whole.adapters()) == ["default/tell.tell.tell.llm"]
    each = lora_world(base, "each", per_stage=True)
    assert list(each.adapters()) == ["default/tell.tell.tell.llm", "default/judge.judge.judge.llm"]
    teach(each, 1, only="default/judge")
    assert texts(each)[0] == tell and texts(each)[1] != judge
    one = lora_world(base, "one", targets=["stage:tell/*"])
    teach(one, 1)
    assert texts(one)[0] != tell and texts(one)[1] == judge
    named = lora_world(base, "named", targets=["role:llm"])
    assert list(named.adapters()) == list(whole.adapters())


def test_what_cannot_be_adapted_is_passed_over_and_listed(base: World) -> None:
    """03 L-2, 01 T-24: blocks without local weights are skipped with the reason."""
    lines = {line.path: line for line in lora_world(base, "noir", targets=["tell/*"]).adapter_report()}
    assert lines[AT["tell"]].adapters == ("default/tell.tell.tell.llm",) and not lines[AT["tell"]].reason
    assert "behind an API" in lines["judge/judge/judge/far"].reason
    assert lines[AT["judge"]].reason == "no set chooses it"
    with pytest.raises(ConfigError, match=r"target 'stage:tel/\*' is no part of world 'base'; did you mean 'tell/\*'"):
        lora_world(base, "noir", targets=["stage:tel/*"])
    with pytest.raises(ConfigError, match=r"can be adapted: it runs behind an API; .*; name blocks"):
        lora_world(base, "noir", targets=["*/far"])
    with pytest.raises(ConfigError, match=r"adapter set 'default': rank: "):
        lora_world(base, "noir", rank=0)
    with pytest.raises(ConfigError, match="needs an id of its own"):
        lora_world(base, "base")
    with pytest.raises(AdapterError, match="build 'b' on its base 'base'"):
        lora_world(lora_world(base, "a"), "b")


def test_only_adapters_learn_and_the_base_keeps_its_hash(base: World) -> None:
    """03 L-1, L-2, 04 X-4: no gradient reaches the base, and its hash after training is that before."""
    world, model = lora_world(base, "noir", rank=2), block_at(base, AT["tell"])
    names = [name for name, _ in world.named_trainable_parameters()]
    assert all(name.startswith("adapters/default/tell.tell.tell.llm:") for name in names) and len(names) == 28
    digest, before = model.weight_hash(), texts(base)
    examples = [{"messages": [{"role": "user", "content": "A storm"}], "answer": answer} for answer in (" lands", " ends")]

    def loss(batch: list[Any]) -> Any:
        with calling(world, AT["judge"]) as block:
            return block.answer_loss(batch)  # type: ignore[attr-defined]

    result = world.fit(examples, TrainingConfig(steps=12, batch_size=2, lr=0.05, eval_every=12), loss, held_out=examples)
    assert result.held_out[12] < result.held_out[0] - 0.2
    assert all(p.grad is None and p.requires_grad for _, p in model.named_parameters())
    assert model.weight_hash() == digest and not model.weights_changed() and texts(base) == before
    assert texts(world) != before
    world.add_adapter("late")
    world.set_trainable("adapters/late", freeze_others=True)
    assert {n.split("/")[1] for n, _ in world.named_trainable_parameters()} == {"late"}
    with pytest.raises(NodeError, match="'tell/tell' is no adapter, and the base stays as it is"):
        world.set_trainable("tell/tell")


def test_sets_are_swapped_combined_and_deleted_while_the_model_stays(base: World) -> None:
    """03 L-3: a hot swap loads nothing; sums of sets are PEFT's."""
    world, plain = lora_world(base, "noir", name="dark", rank=2), texts(base)
    model: Any = block_at(base, AT["tell"])
    weights = model.modules["lm"]
    world.add_adapter("soft", rank=2, alpha=4.0)
    assert world.active == ("dark", "soft")
    teach(world, 1, only="dark")
    teach(world, 2, only="soft")
    world.set_adapter("dark")
    dark = texts(world)
    world.set_adapter("soft")
    soft = texts(world)
    world.set_adapter([])
    assert texts(world) == plain and len({plain, dark, soft}) == 3
    for kind, rank in (("cat", 4), ("svd", 4), ("linear", 2)):
        world.add_weighted_adapter(["dark", "soft"], [0.75, -0.5], kind, kind, **({"svd_rank": 4} if kind == "svd" else {}))
        assert world.sets[kind].rank == rank
    d, s, cat, svd, lin = (world.adapters(n)["tell.tell.tell.llm"] for n in ("dark", "soft", "cat", "svd", "linear"))
    key = "lm__model__layers__0__mlp__up_proj"

    def delta(adapter: Any) -> torch.Tensor:
        layer = adapter.modules[key]
        return layer.scaling["lora"] * layer.lora_B["lora"].weight @ layer.lora_A["lora"].weight

    exact = 0.75 * delta(d) - 0.5 * delta(s)
    torch.testing.assert_close(delta(cat), exact)
    torch.testing.assert_close(delta(svd), exact, atol=1e-5, rtol=1e-4)
    assert delta(lin).shape == exact.shape and not torch.allclose(delta(lin), exact)
    world.set_adapter("cat")
    assert texts(world) not in (plain, dark, soft)
    world.add_weighted_adapter(["dark"], [1.0], "again", "linear")
    world.set_adapter("again")
    assert texts(world) == dark
    world.delete_adapter("dark")
    assert texts(world) == dark and model.modules["lm"] is weights and list(world.sets) == ["soft", "cat", "svd", "linear", "again"]
    with pytest.raises(NodeError, match="no adapter set 'dark'"):
        world.set_adapter("dark")
    with pytest.raises(ConfigError, match="has an adapter set 'soft'"):
        world.add_adapter("soft")
    world.add_adapter("wide", rank=3)
    with pytest.raises(AdapterError, match="same r value"):
        world.add_weighted_adapter(["soft", "wide"], [1, 1], "x", "linear")
    world.add_adapter("late", targets=["judge/*"])
    with pytest.raises(AdapterError, match="different places"):
        world.add_weighted_adapter(["soft", "late"], [1, 1], "x")
    with pytest.raises(AdapterError, match="one weight for each"):
        world.add_weighted_adapter(["soft"], [1, 1], "x")
    with pytest.raises(AdapterError, match="finite numbers"):
        world.add_weighted_adapter(["soft"], [float("nan")], "x")


def test_a_world_that_is_gone_leaves_nothing_on_the_base(base: World) -> None:
    """03 L-2: adapters hang on a model that outlives them."""
    model, before = block_at(base, AT["tell"]), texts(base)
    world = lora_world(base, "noir")
    assert len(model.adapters) == 1
    del world
    assert model.adapters == []
    kept = lora_world(base, "calm")
    teach(kept, 1)
    kept.close()
    assert model.adapters == [] and texts(kept) == before


def test_a_step_names_the_adapters_that_made_it(base: World) -> None:
    """03 C-4, L-2: the snapshot holds the hashes of base and adapters, and the config hash tells sets apart."""
    a, b = lora_world(base, "noir"), lora_world(base, "calm", rank=4)
    teach(a, 1)
    snapshot = a.step(seed=1)
    key = "adapter/default/tell.tell.tell.llm"
    assert snapshot.models[key] == a.adapters()["default/tell.tell.tell.llm"].weight_hash()
    assert len(snapshot.models) == 3
    assert len({a.config_hash, b.config_hash, base.config_hash}) == 3 and snapshot.config_hash == a.config_hash
    fork = a.fork("noir2")
    assert isinstance(fork, LoraWorld) and fork.adapters()["default/tell.tell.tell.llm"].weight_hash() == snapshot.models[key]
    assert texts(fork) == texts(a)
    teach(fork, 5)
    assert texts(fork) != texts(a)


def test_an_interrupted_step_is_not_taken_up_with_other_adapters(base: World) -> None:
    """03 C-10: what a stage made with other numbers in its adapters is made again."""
    world = lora_world(base, "noir")
    teach(world, 1)

    def told() -> str:
        flow = world.run_stage("tell", world.begin(seed=1))
        world.abandon(flow)
        return flow.state["intent"]["text"]

    first = told()
    assert told() == first
    teach(world, 2)
    other = told()
    assert other != first
    teach(world, 1)
    assert told() == first


def test_a_world_file_on_a_base_file(folder: Path, base: World, tmp_path: Path) -> None:
    """03 W-17, L-2: `execution.base` and `execution.adapters`; round trips, and one pool shares the model."""
    assert base.save_config(tmp_path / "base.yaml")
    world = lora_world(base, "noir", rank=2, alpha=8, targets=["stage:judge/*"], title="Noir")
    teach(world, 1)
    world.save_adapters(tmp_path / "noir")
    world.adapter_folder = Path("noir")
    world.save_config(tmp_path / "noir.yaml", base_file="base.yaml")
    text = (tmp_path / "noir.yaml").read_text()
    assert "ref: base.yaml" in text and "harbour" not in text.lower()
    pool = ModelPool()
    loaded, plain = World.from_yaml(tmp_path / "noir.yaml", pool=pool), World.from_yaml(tmp_path / "base.yaml", pool=pool)
    assert isinstance(loaded, LoraWorld) and loaded.config_hash == world.config_hash and loaded.title == "Noir"
    assert block_at(loaded, AT["tell"]) is block_at(plain, AT["tell"])
    assert texts(loaded) == texts(world) and texts(plain) == texts(base) == texts(loaded.base)
    again = World.from_config(loaded.to_config(), pool=pool)
    assert again.to_config() == loaded.to_config() and again.config_hash == loaded.config_hash
    other = {**loaded.to_config(), "content": {"description": "A city of rain."}}
    assert World.from_config(other, pool=pool).initial_content.description == "A city of rain."
    limited = loaded.to_config()
    limited["execution"]["budget"] = {"calls": 1}
    assert World.from_config(limited, pool=pool).begin().budget == {"calls": 1} != loaded.begin().budget
    assert loaded.initial_content.description == base.initial_content.description


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e["base"].update(config_hash="0" * 64), r"base.config_hash: world 'noir' stands on 'base' with config hash 000"),
        (lambda e: e.pop("adapters"), "both a 'base' and 'adapters'"),
        (lambda e: e.update(cycle=["tell"]), "leave out cycle"),
        (lambda e: e["adapters"].update(active=["nor"]), "active names the set 'nor'; known: 'default'"),
        (lambda e: e["adapters"]["sets"]["default"].update(rnk=2), "unknown key 'rnk'; did you mean 'rank'"),
        (lambda e: e["adapters"]["sets"]["default"].update(targets=["x/*"]), r"execution.adapters: .*target 'x/\*' is no part"),
        (lambda e: e.pop("base") and e.pop("adapters"), "'stages' is missing"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(base: World, change: Any, said: str) -> None:
    """03 L-2, W-17."""
    given = lora_world(base, "noir").to_config()
    change(given["execution"])
    with pytest.raises(ConfigError, match=said):
        World.from_config(given)


def test_a_folder_that_is_not_there_is_no_fresh_adapter(base: World) -> None:
    """03 L-4: no silent fallback."""
    world = lora_world(base, "noir", folder="nowhere")
    with pytest.raises(NodeExecutionError, match=r"no adapter in .*nowhere/default/tell") as found:
        texts(world)
    assert isinstance(found.value.__cause__, MissingModelError)
    assert texts(base)


def test_merged_for_export(base: World, tmp_path: Path) -> None:
    """03 L-2: an ordinary world with merged copies, saved through the ordinary checkpoint; the base is not touched."""
    world, before = lora_world(base, "noir", targets=["stage:judge/*"], rank=2), texts(base)
    teach(world, 3)
    digest, wanted = block_at(base, AT["judge"]).weight_hash(), texts(world)
    merged = world.merged("noir_whole")
    assert type(merged) is World and block_at(merged, AT["tell"]) is block_at(base, AT["tell"])
    assert block_at(merged, AT["judge"]) is not block_at(base, AT["judge"])
    ids = torch.tensor([[1, 5, 7, 9]])
    model: Any = block_at(merged, AT["judge"])
    adapter = world.adapters()["default/tell.tell.tell.llm"]
    adapter.places = None
    torch.testing.assert_close(model.modules["lm"](ids).logits, block_at(base, AT["tell"]).modules["lm"](ids).logits)
    world.set_adapter(world.active)
    merged.set_storage(tmp_path / "others")
    assert texts(merged) == wanted and block_at(base, AT["judge"]).weight_hash() == digest and texts(base) == before
    merged.save(tmp_path / "whole")
    assert texts(World.load(tmp_path / "whole")) == wanted


def test_a_lora_world_is_saved_and_loaded_whole(base: World, tmp_path: Path) -> None:
    """03 W-18, 02 S-7: structure, base and adapters in one folder."""
    world = lora_world(base, "noir", rank=2)
    teach(world, 3)
    world.save(tmp_path / "saved")
    loaded = World.load(tmp_path / "saved")
    assert isinstance(loaded, LoraWorld) and texts(loaded) == texts(world)
    assert loaded.to_config() == world.to_config()


def test_which_adapters_work_can_be_asked_inside_a_call(base: World) -> None:
    """03 L-3: for caches that must not serve another adapter set."""
    world, model = lora_world(base, "noir", targets=["judge/*"]), block_at(base, AT["tell"])
    seen: dict[str, int] = {}
    for w in (base, world):
        flow = w.begin(seed=1, state={})
        hook = lambda event, w=w: seen.update({event.path: len(working_on(model))}) if event.kind == "model_call" and "llm" in event.path else None  # noqa: E731
        for role in w.cycle:
            flow = w.run_stage(role, flow, hooks=[hook])
        w.store.journal_clear(w.world_id, flow.step)
        w.abandon(flow)
    assert seen == {f"base/{AT['tell']}": 0, f"base/{AT['judge']}": 0, f"noir/{AT['tell']}": 0, f"noir/{AT['judge']}": 1}


def test_a_model_with_int8_weights_is_passed_over(folder: Path) -> None:
    """03 L-2: seen from its config, before anything is loaded."""
    given = config(folder)
    given["execution"]["models"]["text"]["config"] |= {"weights": "int8", "dtype": "float32"}
    base = World.from_config(given, pool=ModelPool())
    assert {line.reason for line in report(base, {}) if line.path in AT.values()} == {
        "its weights are int8, which are neither trained nor adapted"
    }
    with pytest.raises(ConfigError, match=r"can be adapted: its weights are int8, .*; name blocks"):
        lora_world(base, "noir")


def test_validate_and_dry_run_load_nothing(folder: Path) -> None:
    """03 W-16: building, checking and reporting a LoRA world touches no model."""
    given = config(folder)
    world = lora_world(World.from_config(given, pool=ModelPool()), "noir")
    world.dry_run()
    assert world.adapter_report() and not block_at(world, AT["tell"]).materialized

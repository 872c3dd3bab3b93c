"""Fitting: the numbers are those of the formulas, and a training that was killed goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Linear, Net, Odd, chain
from safetensors.torch import load_file

from wg_core import ModelPool
from wg_core.errors import AbortRun, CheckpointError, ConfigError, NotFiniteError, NothingTrainableError
from wg_core.execution.context import Event
from wg_core.weights.fit import GroupSettings, TrainingConfig, fit

HERE = Path(__file__).parent


def line(weight: float = 1.0) -> tuple[Any, Any]:
    """One number w, and the loss mean((w x - y)^2) over pairs."""
    w = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def loss(batch: Any) -> Any:
        x, y = (torch.tensor(side, dtype=torch.float64) for side in zip(*batch, strict=True))
        return (w * x - y).square().mean()

    return w, loss


PAIRS = [(1.0, 3.0), (2.0, 6.0), (-1.0, -3.0), (0.5, 1.5)]


def slope(w: float, pairs: list[tuple[float, float]]) -> float:
    return sum(2 * (w * x - y) * x for x, y in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("more", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup": 2, "final_lr": 0.5}, [0.5, 1, 1, 0.75]),
        ({"schedule": "cosine"}, [1, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_sgd_follows_its_schedule(more: dict[str, Any], factors: list[float]) -> None:
    """02 T-6: each update is w - lr factor dw, over all four pairs."""
    w, loss = line()
    expected, rates = 1.0, list[float]()
    config = TrainingConfig(optimizer="sgd", lr=0.1, steps=4, batch_size=4, **more)
    fit([("w", w)], PAIRS, loss, config, hooks=[lambda e: rates.append(e.data["lr"]) if e.kind == "train_step" else None])
    for factor in factors:
        expected -= 0.1 * factor * slope(expected, PAIRS)
    assert w.item() == pytest.approx(expected, rel=1e-12)
    assert rates == pytest.approx([0.1 * f for f in factors])


@pytest.mark.parametrize("tokens", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(tokens: bool) -> None:
    """Also where the parts are means over different numbers of tokens."""
    w, loss = line()
    counts = {1.0: 5, 2.0: 1, -1.0: 2, 0.5: 4}

    def weighted(batch: Any) -> Any:
        return (loss(batch), sum(counts[x] for x, _ in batch)) if tokens else loss(batch)

    fit([("w", w)], PAIRS, weighted, TrainingConfig(optimizer="sgd", lr=0.1, steps=1, accumulate=4))
    each = {p: slope(1.0, [p]) for p in PAIRS}
    mean = sum(counts[p[0]] * g for p, g in each.items()) / 12 if tokens else sum(each.values()) / 4
    assert w.item() == pytest.approx(1 - 0.1 * mean, rel=1e-12)


def test_clipping_bounds_the_norm_and_adamw_is_torchs() -> None:
    w, loss = line()
    fit([("w", w)], PAIRS, loss, TrainingConfig(optimizer="sgd", lr=0.1, steps=1, batch_size=4, clip_norm=0.5))
    assert w.item() == pytest.approx(1 + 0.1 * 0.5, rel=1e-5)  # torch adds 1e-6 to the norm that it divides by
    w, loss = line()
    fit([("w", w)], PAIRS, loss, TrainingConfig(lr=0.1, steps=1, batch_size=4, weight_decay=0.5))
    assert w.item() == pytest.approx((1 - 0.1 * 0.5) + 0.1, rel=1e-6)  # first step of AdamW: decay, then lr * sign


def test_each_parameter_once_and_groups_with_their_own_rate() -> None:
    """02 T-2, T-5: a tied parameter that comes twice is updated once."""
    block = Odd()
    names = [n for n, _ in block.named_trainable_parameters()]
    assert sum(n.startswith(("odd.embed", "odd.out")) for n in names) == 1
    w, loss = line()
    v = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    def both(batch: Any) -> Any:
        return loss(batch) + v

    config = TrainingConfig(optimizer="sgd", lr=0.1, steps=1, batch_size=4, per_path={"b": GroupSettings(lr=0.5)})
    fit([("a:w", w), ("b:v", v), ("c:w", w)], PAIRS, both, config)
    assert w.item() == pytest.approx(1 - 0.1 * slope(1.0, PAIRS)) and v.item() == pytest.approx(-0.5)


def test_nothing_to_learn() -> None:
    """01 T-44: before the optimizer; and a loss that no parameter is in."""
    with pytest.raises(NothingTrainableError, match="no parameter to train"):
        fit([], PAIRS, lambda batch: torch.tensor(0.0), TrainingConfig())
    w, _ = line()
    with pytest.raises(NothingTrainableError, match="depends on no parameter"):
        fit([("w", w)], PAIRS, lambda batch: torch.tensor(0.0), TrainingConfig())
    with pytest.raises(ConfigError, match="no examples"):
        fit([("w", w)], [], lambda batch: torch.tensor(0.0), TrainingConfig())
    with pytest.raises(ConfigError, match="scalar tensor"):
        fit([("w", w)], PAIRS, lambda batch: w.expand(2), TrainingConfig())


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    """02 T-10: also what the very last update spoilt, which is never kept as a state to go on from."""
    w, loss = line(float("nan"))
    with pytest.raises(NotFiniteError, match=r"step 0: the loss is nan on examples \[\d\]; a/b:w is the first"):
        fit([("a/b:w", w)], PAIRS, loss, TrainingConfig())
    v = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(NotFiniteError, match="step 0: a gradient is not finite; the gradient of a:v is the first"):
        fit([("a:v", v)], PAIRS, lambda batch: v.sqrt(), TrainingConfig())
    w, loss = line()
    with pytest.raises(NotFiniteError, match=r"held-out loss is inf; the parameters themselves are finite"):
        fit([("w", w)], PAIRS, loss, TrainingConfig(), held_out=[(1e300, 1.0)])
    w, loss = line()
    config = TrainingConfig(optimizer="sgd", lr=1e308, steps=1, batch_size=4)
    with pytest.raises(NotFiniteError, match="step 1: a/b:w is not finite after the update; lower lr"):
        fit([("a/b:w", w)], PAIRS, loss, config, folder=tmp_path)
    assert not (tmp_path / "training_state" / "state.json").exists()


def test_it_stops_when_the_held_out_loss_no_longer_falls_and_keeps_the_best() -> None:
    w, loss = line(0.0)  # examples pull to 3, held-out ones to 1.2: the best is on the way
    told: list[Event] = []
    config = TrainingConfig(optimizer="sgd", lr=0.05, steps=100, batch_size=4, eval_every=1, patience=2)
    result = fit([("w", w)], PAIRS, loss, config, held_out=[(1.0, 1.2)], hooks=[told.append])
    assert result.stopped == "patience" and result.best_step is not None and result.steps == result.best_step + 2
    best = min(result.held_out, key=lambda step: result.held_out[step])
    assert result.best_step == best and result.held_out[best] == pytest.approx((w.item() - 1.2) ** 2)
    kinds = [e.kind for e in told]
    assert kinds[:2] == ["train_start", "train_eval"] and kinds[-1] == "train_end"
    assert kinds.count("train_step") == result.steps and kinds.count("train_eval") == result.steps + 1
    step = next(e for e in told if e.kind == "train_step").data
    assert {"step": 1, "of": 100, "lr": 0.05}.items() <= step.items() and step["loss"] > 0
    assert all(e.data["held_out_loss"] > 0 for e in told if e.kind == "train_eval")


def test_the_order_of_examples_follows_the_seed_and_torchs_generator_is_left_alone() -> None:
    def seen(seed: int) -> list[int]:
        w, _ = line()
        order: list[int] = []
        fit([("w", w)], range(5), lambda b: order.extend(b) or w * torch.rand(()), TrainingConfig(seed=seed, steps=10))
        return order

    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    first = seen(0)
    assert torch.equal(torch.rand(()), expected)
    assert first == seen(0) != seen(1)
    assert sorted(first[:5]) == sorted(first[5:]) == list(range(5)) and first[:5] != first[5:]


def test_a_hook_may_stop_it() -> None:
    w, loss = line()

    def stop(event: Event) -> None:
        if event.kind == "train_step" and event.data["step"] == 2:
            raise AbortRun("enough")

    with pytest.raises(AbortRun, match="enough"):
        fit([("w", w)], PAIRS, loss, TrainingConfig(), hooks=[stop])


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32() -> None:
    layer = torch.nn.Linear(4, 4)
    seen: list[Any] = []

    def loss(batch: Any) -> Any:
        y = layer(torch.ones(1, 4))
        seen.append(y.dtype)
        return y.float().square().mean()

    fit(list(layer.named_parameters()), [0], loss, TrainingConfig(steps=1, precision="bfloat16"))
    assert seen == [torch.bfloat16] and layer.weight.dtype == torch.float32


def run(*args: Any) -> list[int]:
    more = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(HERE / "train_and_stop.py"), *map(str, args)], env={**os.environ, **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(ended) for ended in done.stdout.split()]


def test_a_killed_training_goes_on_to_equal_weights(tmp_path: Path) -> None:
    """03 L-6, 02 S-13, T-10: killed between two saves; optimizer, schedule, random numbers, buffers and place in the data."""
    whole, cut = ((tmp_path / name, tmp_path / f"{name}.safetensors") for name in ("whole", "cut"))
    assert run(*whole, -1, *cut, 8, *cut, -1) == [0, -signal.SIGKILL, 0]
    state = json.loads((tmp_path / "cut.killed/training_state/state.json").read_text())
    assert state["step"] == 6 and state["position"] == 24 and state["config"]["warmup"] == 3
    whole, cut = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    told = [(tmp_path / f"{name}.txt").read_text().split(maxsplit=2) for name in ("whole", "cut")]
    assert [t[:2] for t in told] == [["12", "0"], ["12", "6"]] and told[0][2] == told[1][2]


def test_the_state_on_the_disk_is_checked(tmp_path: Path) -> None:
    w, loss = line()
    config = TrainingConfig(optimizer="sgd", momentum=0.9, steps=3, lr=0.01)
    done = fit([("w", w)], PAIRS, loss, config, folder=tmp_path)
    again, loss = line()
    more = fit([("w", again)], PAIRS, loss, config, folder=tmp_path)
    assert more.resumed_at == more.steps == done.steps == 3 and torch.equal(again, w)
    with pytest.raises(CheckpointError, match=r"another training: config.lr \(0.01 there, 0.02 here\) differ"):
        fit([("w", w)], PAIRS, loss, config.model_copy(update={"lr": 0.02}), folder=tmp_path)
    with pytest.raises(CheckpointError, match="another training: data differ"):
        fit([("w", w)], PAIRS[:2], loss, config, folder=tmp_path)
    with pytest.raises(ConfigError, match="example 0 is object, which has no fingerprint"):
        fit([("w", w)], [object()], loss, config, folder=tmp_path)
    files = list((tmp_path / "training_state").glob("*.safetensors"))
    assert len(files) == 1 and not list((tmp_path / "training_state").glob(".tmp*"))
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="does not match its hash"):
        fit([("w", w)], PAIRS, loss, config, folder=tmp_path)
    (tmp_path / "training_state/state.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not readable"):
        fit([("w", w)], PAIRS, loss, config, folder=tmp_path)


def test_a_trained_model_is_not_served_for_its_reference(tmp_path: Path) -> None:
    """01 E-2: who asks for the reference afterwards gets what it names; the trained one keeps its users."""
    from nets import registry
    from safetensors.torch import save_file

    save_file(Linear(init_seed=4).state_dict(), tmp_path / "model.safetensors")
    entry = {"block_type": "test/linear", "config": {"checkpoint_ref": str(tmp_path / "model.safetensors")}}
    pool, types = ModelPool(), registry()
    trained: Any = pool.get_or_build(entry, types)
    assert pool.get_or_build(entry, types) is trained
    was = trained.weight_hash() or (trained.materialize(), trained.weight_hash())[1]
    graph = chain(("net", trained))
    bound = [{"output": "y", "target": "y"}]
    x = torch.ones(1, 3)
    graph.fit([{"inputs": {"x": x}, "targets": {"y": x}}], TrainingConfig(steps=1, loss=bound))  # type: ignore[arg-type]
    fresh: Any = pool.get_or_build(entry, types)
    fresh.materialize()
    assert fresh is not trained and fresh.weight_hash() == was != trained.weight_hash()
    assert pool.get_or_build(entry, types) is fresh


@pytest.mark.parametrize("changed", ["base", "head"])
def test_a_training_does_not_go_on_over_other_weights_that_rest(changed: str, tmp_path: Path) -> None:
    """03 L-6, 02 S-13: a frozen block, and what is frozen of one that learns, must be what the training began with."""

    def graph(*, seeds: tuple[int, int] = (1, 2)) -> Any:
        made = chain(("base", Linear(init_seed=seeds[0])), ("head", Net(init_seed=seeds[1])))
        made.nodes["head"].child.freeze("enc.0.*")
        return made

    def stop(event: Event) -> None:
        if event.kind == "train_step" and event.data["step"] == 3:
            raise AbortRun("killed")

    x = torch.arange(6.0).reshape(2, 3)
    examples: Any = [{"inputs": {"x": x}, "targets": {"y": x}}]
    bound: Any = [{"output": "y", "target": "y"}]
    config = TrainingConfig(steps=4, save_every=2, lr=0.01, trainable=["head"], freeze_others=True, loss=bound)
    with pytest.raises(AbortRun):
        graph().fit(examples, config, folder=tmp_path, hooks=[stop])
    other = graph(seeds=(3, 2)) if changed == "base" else graph()
    if changed == "head":
        with torch.no_grad():
            dict(other.nodes["head"].child.named_parameters())["enc.0.bias"].add_(1)
    with pytest.raises(CheckpointError, match=rf"other weights .* do not learn: {changed} \([0-9a-f]{{64}} there, [0-9a-f]{{64}} here\)"):
        other.fit(examples, config, folder=tmp_path)
    same = graph()
    done = same.fit(examples, config, folder=tmp_path)
    assert (done.resumed_at, done.steps) == (2, 4)
    again = same.fit(examples, config, folder=tmp_path)  # what has learned is not what rests
    assert again.resumed_at == 4

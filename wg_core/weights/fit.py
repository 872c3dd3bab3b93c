"""Fitting parameters to examples: one loop for every level, which goes on after a kill as if nothing had been.

The optimizers are torch's: AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) and SGD.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wg_core.errors import CheckpointError, ConfigError, NotFiniteError, NothingTrainableError
from wg_core.execution.context import Frame, Hook, RunOptions, derive_seed
from wg_core.weights.training_config import Binding, GroupSettings, TrainingConfig, parameter_groups
from wg_core.weights.training_state import FOLDER, fingerprint, read_state, write_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Loss = Callable[[Sequence[Any]], Any]


@dataclass(slots=True)
class FitResult:
    """How a training went: updates done, the last loss, held-out losses by step, the best step, and why it ended.

    `stopped` is `steps` or `patience`; `resumed_at` is the step that it went on from.
    """

    steps: int = 0
    loss: float | None = None
    held_out: dict[int, float] = field(default_factory=dict[int, float])
    best_step: int | None = None
    stopped: str = ""
    resumed_at: int = 0


def fit(
    parameters: Iterable[tuple[str, Any]],
    examples: Sequence[Any],
    loss: Loss,
    config: TrainingConfig,
    *,
    held_out: Sequence[Any] = (),
    folder: Path | str | None = None,
    hooks: Sequence[Hook] = (),
    buffers: Iterable[tuple[str, Any]] = (),
    resting: Mapping[str, str | None] | None = None,
) -> FitResult:
    """Train parameters on examples until `config.steps`, or until the held-out loss no longer falls.

    `parameters` are `(path:name, parameter)`; one that comes under several names is trained once. `loss(batch)` gives a
    scalar tensor, the mean over the batch, or `(tensor, tokens)`, the mean over so many tokens; what it draws at random
    it draws from torch. For held-out examples it is called with gradients off. The order of examples follows
    `config.seed`. With a `folder` the state is kept in its `training_state/`, `buffers` (tensors that change beside the
    parameters) too, and a training of the same config and examples that is there goes on to equal weights. `resting` are
    hashes, by path, of weights that the loss reads and that do not learn: they must be those that it began with.

    Hooks get the events `train_start, train_step, train_eval, train_end`, with `{step, of, loss, lr, tokens_per_s?,
    held_out_loss?}` as data.

    Raises: NothingTrainableError, NotFiniteError naming step and parameter, ConfigError, CheckpointError for the state
    of another training, or of one over other weights, AbortRun.
    """
    training = _Training(parameters, examples, loss, config, held_out, folder, hooks, buffers, resting or {})
    with training.randomness():
        return training.run()


class _Training:
    def __init__(
        self,
        parameters: Iterable[tuple[str, Any]],
        examples: Sequence[Any],
        loss: Loss,
        config: TrainingConfig,
        held_out: Sequence[Any],
        folder: Path | str | None,
        hooks: Sequence[Hook],
        buffers: Iterable[tuple[str, Any]],
        resting: Mapping[str, str | None],
    ) -> None:
        groups = parameter_groups(parameters, config)
        import torch

        if not len(examples):
            raise ConfigError("there are no examples to train on")
        self.loss, self.config, self.examples, self.held_out = loss, config, examples, held_out
        self.named: dict[str, Tensor] = {n: p for g in groups for n, p in zip(g["names"], g["params"], strict=True)}
        self.buffers: dict[str, Tensor] = dict(buffers)
        self.resting = dict(resting)
        self.folder = Path(folder) / FOLDER if folder is not None else None
        self.data = fingerprint(examples, held_out) if folder is not None else ""
        self.frame = Frame("train", "train", RunOptions(training=True, callbacks=tuple(hooks)))
        self.device = next(iter(self.named.values())).device
        self.precision()
        if config.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.lr_factor)
        self.order = _Order(len(examples), config.seed)
        self.result = FitResult()
        self.best: dict[str, Tensor] = {}
        self.since_best = 0

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        ended = self.resume()
        result, config = self.result, self.config
        numbers = sum(p.numel() for p in self.named.values())
        self.tell("train_start", parameters=len(self.named), numbers=numbers, examples=len(self.examples))
        if not ended and result.steps == 0:
            self.evaluate()
        while not ended:
            self.update()
            last = result.steps == config.steps
            if last or (config.eval_every and result.steps % config.eval_every == 0):
                self.evaluate()
            worn = config.patience is not None and self.since_best >= config.patience
            ended = last or worn
            if ended:
                result.stopped = "steps" if last else "patience"
            if ended or (config.save_every and result.steps % config.save_every == 0):
                self.save()
        self.optimizer.zero_grad()
        if self.best and config.keep_best:
            _copy(self.best, self.named)
        self.tell("train_end", stopped=result.stopped, best_step=result.best_step)
        return result

    def update(self) -> None:
        """One update: the gradient of the mean loss over its examples, taken in `accumulate` parts."""
        import torch

        config, step, began = self.config, self.result.steps, time.perf_counter()
        start = step * config.batch_size * config.accumulate
        self.optimizer.zero_grad()
        total, weight, tokens = 0.0, 0, 0
        for part in range(config.accumulate):
            indices = self.order.take(start + part * config.batch_size, config.batch_size)
            with self.precision():
                loss, counted = _parts(self.loss([self.examples[i] for i in indices]))
            if not loss.requires_grad:
                raise NothingTrainableError(
                    f"step {step}: the loss depends on no parameter that learns; what lies between (a block behind an API, "
                    "a remote level, a block that gives no tensors) lets no gradient through"
                )
            share = counted or len(indices)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NotFiniteError(f"step {step}: the loss is {value} on examples {indices}; {self.culprit(False)}")
            (loss if config.accumulate == 1 else loss * share).backward()
            total, weight, tokens = total + value * share, weight + share, tokens + counted
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        if config.accumulate > 1:
            for gradient in gradients:
                gradient.div_(weight)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            raise NotFiniteError(f"step {step}: a gradient is not finite; {self.culprit(True)}")
        if config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.named.values(), config.clip_norm, norm)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.result.steps, self.result.loss = step + 1, total / weight
        speed = {"tokens_per_s": tokens / (time.perf_counter() - began)} if tokens else {}
        self.tell("train_step", lr=rate, grad_norm=float(norm), **speed)

    def evaluate(self) -> None:
        """The held-out loss as it is now, with the same random numbers at every time."""
        import torch

        if not len(self.held_out):
            return
        total, weight, size = 0.0, 0, self.config.batch_size
        with self.randomness("held out"), torch.no_grad(), self.precision():
            for start in range(0, len(self.held_out), size):
                batch = [self.held_out[i] for i in range(start, min(start + size, len(self.held_out)))]
                loss, counted = _parts(self.loss(batch))
                share = counted or len(batch)
                total, weight = total + float(loss) * share, weight + share
        found, result = total / weight, self.result
        if not math.isfinite(found):
            raise NotFiniteError(f"step {result.steps}: the held-out loss is {found}; {self.culprit(False)}")
        result.held_out[result.steps] = found
        if result.best_step is None or found < result.held_out[result.best_step]:
            result.best_step, self.since_best = result.steps, 0
            if self.config.keep_best:
                self.best = {name: p.detach().clone() for name, p in self.named.items()}
        else:
            self.since_best += 1
        self.tell("train_eval", held_out_loss=found)

    def culprit(self, gradients: bool) -> str:
        """Which parameter is not finite, and what may help."""
        for name, p in self.named.items():
            value = p.grad if gradients else p
            if value is not None and not bool(value.isfinite().all()):
                return f"{'the gradient of ' if gradients else ''}{name} is the first that is not; lower lr, or set clip_norm"
        return "the parameters themselves are finite: look at inputs and targets, or lower lr; a bound loss names the port"

    def tell(self, kind: str, **data: Any) -> None:
        base = {"step": self.result.steps, "of": self.config.steps, "loss": self.result.loss}
        self.frame.emit(kind, data={**base, "lr": self.optimizer.param_groups[0]["lr"], **data})

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def precision(self) -> AbstractContextManager[Any]:
        """Mixed precision where it is asked for. Raises: ConfigError where the device has none."""
        import torch

        if self.config.precision == "float32":
            return nullcontext()
        if self.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigError(f"precision: {self.device} has no bfloat16; use float32")
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextmanager
    def randomness(self, *purpose: str) -> Generator[None]:
        """Random numbers that follow the seed (and `purpose`) alone; the generators of the program go on as before."""
        import torch

        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(self.config.seed, "fit", *purpose))
            yield

    # ---- state -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Keep the state where there is a folder. Raises: NotFiniteError for parameters that the last update spoilt."""
        import torch

        for name, p in self.named.items():
            if not bool(p.isfinite().all()):
                raise NotFiniteError(f"step {self.result.steps}: {name} is not finite after the update; lower lr, or set clip_norm")
        if self.folder is None:
            return
        now: dict[str, Tensor] = {f"parameter/{name}": p for name, p in self.named.items()}
        now |= {f"buffer/{name}": b for name, b in self.buffers.items()}
        for name, p in self.named.items():
            now |= {f"optimizer/{name}/{k}": v for k, v in self.optimizer.state[p].items() if v is not None}
        now["rng/cpu"] = torch.random.get_rng_state()
        if self.device.type == "cuda":
            now["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        result = self.result
        data = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data,
            "names": list(self.named),
            "resting": self.resting,
            "step": result.steps,
            "position": result.steps * self.config.batch_size * self.config.accumulate,
            "loss": result.loss,
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "schedule": self.schedule.last_epoch,
            "held_out": list(result.held_out.items()),
            "best_step": result.best_step,
            "since_best": self.since_best,
            "stopped": result.stopped,
        }
        write_state(self.folder, data, {"now": now, **({"best": self.best} if self.best else {})})

    def resume(self) -> bool:
        """Take up what is in the folder; gives whether that training had come to its end.

        Raises: CheckpointError for the state of another training.
        """
        import torch

        found = read_state(self.folder) if self.folder is not None else None
        if found is None:
            return False
        data, tensors = found
        self.compare(data)
        now = tensors["now"]
        _copy({n: now[f"parameter/{n}"] for n in self.named}, self.named)
        _copy({n: now[f"buffer/{n}"] for n in self.buffers}, self.buffers)
        for name, p in self.named.items():
            prefix = f"optimizer/{name}/"
            kept = {k.removeprefix(prefix): v for k, v in now.items() if k.startswith(prefix)}
            if kept:
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}
        for group, rate in zip(self.optimizer.param_groups, data["lr"], strict=True):
            group["lr"] = rate
        self.schedule.last_epoch = data["schedule"]
        torch.random.set_rng_state(now["rng/cpu"])
        if "rng/cuda" in now and self.device.type == "cuda":
            torch.cuda.set_rng_state(now["rng/cuda"], self.device)
        held = {int(step): float(value) for step, value in data["held_out"]}
        self.result = FitResult(data["step"], data["loss"], held, data["best_step"], data["stopped"], data["step"])
        self.since_best = data["since_best"]
        self.best = {n: t.to(self.named[n].device) for n, t in tensors.get("best", {}).items()}
        return bool(data["stopped"])

    def compare(self, data: dict[str, Any]) -> None:
        mine: dict[str, Any] = {"config": self.config.model_dump(mode="json"), "data": self.data, "names": list(self.named)}
        wrong = [key for key, value in mine.items() if data.get(key) != value]
        if wrong == ["config"]:
            there, here = data["config"], mine["config"]
            wrong = [f"config.{k} ({there.get(k)!r} there, {v!r} here)" for k, v in here.items() if there.get(k) != v]
        if wrong:
            raise CheckpointError(
                f"{self.folder} holds the state of another training: {', '.join(wrong)} differ; "
                "choose another folder, or remove that one to begin anew"
            )
        began: dict[str, Any] = data.get("resting", {})
        other = [
            f"{path} ({began.get(path)} there, {self.resting.get(path)} here)"
            for path in {**began, **self.resting}
            if began.get(path) != self.resting.get(path)
        ]
        if other:
            raise CheckpointError(
                f"{self.folder} holds a training over other weights than those here, which do not learn: {', '.join(other)}; "
                "go on over those that it began with, or remove that folder to begin anew"
            )


class _Order:
    """The order of examples: each epoch all of them once, shuffled by the seed and the number of the epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch = -1
        self.shuffled: list[int] = []

    def take(self, position: int, count: int) -> list[int]:
        """The indices of `count` examples from `position` on, over the ends of epochs."""
        import torch

        taken: list[int] = []
        for at in range(position, position + count):
            epoch, place = divmod(at, self.size)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                self.epoch = epoch
                self.shuffled = cast("list[int]", torch.randperm(self.size, generator=generator).tolist())
            taken.append(self.shuffled[place])
        return taken


def _parts(given: Any) -> tuple[Any, int]:
    """The loss, and the number of tokens that it is the mean over (0 where it does not say)."""
    loss, tokens = cast("tuple[Any, int]", given) if isinstance(given, tuple) else (given, 0)
    if getattr(loss, "ndim", None) != 0:
        raise ConfigError(f"a loss gives a scalar tensor, not {type(loss).__name__} of shape {list(getattr(loss, 'shape', ()))}")
    return loss, int(tokens)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


__all__ = ["Binding", "FitResult", "GroupSettings", "Loss", "TrainingConfig", "fit", "parameter_groups"]

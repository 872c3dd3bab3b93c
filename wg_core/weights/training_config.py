"""How a training goes, as plain data: what learns, by which loss, how fast, and how long."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from wg_core.errors import ConfigError, NothingTrainableError, did_you_mean
from wg_core.weights.tree import is_tensor

BLOCK = "block:"
REST = "rest"  # the name of the group of all that no entry of `per_path` means


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True, frozen=True)


class Binding(Strict):
    """One term of a loss: a value that a run gives, and what it is compared with.

    The value is an `output` of the level, or a port below it (`capture: path:port`). `target` names an entry of the
    example's targets; the kind `value` has none: there the value itself, as of a loss block, is the loss.
    """

    output: str | None = None
    capture: str | None = None
    target: str | None = None
    kind: Literal["mse", "l1", "cross_entropy", "binary_cross_entropy", "value"] = "mse"
    weight: float = 1.0

    @model_validator(mode="after")
    def _one_value(self) -> Self:
        if (self.output is None) == (self.capture is None):
            raise ValueError("a loss names either an output or a port to capture (path:port)")
        if (self.target is None) != (self.kind == "value"):
            raise ValueError("a loss of kind 'value' has no target; any other names one")
        return self

    def measure(self, value: Any, targets: Mapping[str, Any]) -> Any:
        """The term as a scalar tensor; `cross_entropy` and `binary_cross_entropy` take logits.

        Raises: ConfigError for a target that the example lacks.
        """
        import torch
        from torch.nn import functional

        if not is_tensor(value):
            raise ConfigError(f"loss: {self.output or self.capture} is {type(value).__name__}, and no tensor to learn from")
        if self.target is None:
            return value.mean()
        if self.target not in targets:
            raise ConfigError(f"loss: the example has no target {self.target!r}; {did_you_mean(self.target, targets)}")
        wanted: Any = torch.as_tensor(targets[self.target], device=value.device)
        if self.kind == "cross_entropy":
            return functional.cross_entropy(value, wanted)
        wanted = wanted.to(value.dtype)
        if self.kind == "binary_cross_entropy":
            return functional.binary_cross_entropy_with_logits(value, wanted)
        if value.shape != wanted.shape:
            raise ConfigError(
                f"loss: {self.output or self.capture} has shape {list(value.shape)}, target {self.target!r} {list(wanted.shape)}"
            )
        return functional.mse_loss(value, wanted) if self.kind == "mse" else functional.l1_loss(value, wanted)


class GroupSettings(Strict):
    """What holds for the parameters of one path instead of the general settings."""

    lr: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class TrainingConfig(Strict):
    """A training as plain data, kept beside its checkpoints.

    `trainable` lists paths and patterns for `set_trainable`. `per_path` gives settings to what stands at a path (all
    below it too), to a glob over `path:name`, or to one block by its key (`block:KEY`); the longest that meets a
    parameter counts, and a block key before all others. `steps` counts updates; each takes `batch_size` times
    `accumulate` examples. `warmup` steps lead up to `lr`, the schedule then down to `final_lr` times `lr`. Every
    `eval_every` steps the held-out loss is taken (0: before and after only); without a better one in `patience` of
    them the training ends. `keep_best` goes back to the weights of the best one. Every `save_every` steps the state is
    written where there is a folder (0: at the end only).
    """

    trainable: tuple[str, ...] = ()
    freeze_others: bool = True
    loss: tuple[Binding, ...] = ()
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    per_path: dict[str, GroupSettings] = {}
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=1, ge=1)
    accumulate: int = Field(default=1, ge=1)
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(default=0, ge=0)
    eval_every: int = Field(default=0, ge=0)
    patience: int | None = Field(default=None, ge=1)
    keep_best: bool = True
    save_every: int = Field(default=0, ge=0)

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied with in update `step` (from 0).

        Linear warm-up, then constant, linear, or half a cosine (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983).
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return shape if self.schedule == "constant" else self.final_lr + (1 - self.final_lr) * shape


def unique_parameters(parameters: Iterable[tuple[str, Any]]) -> dict[str, tuple[Any, list[str]]]:
    """Each parameter once, under its first name, with all its names; order as given.

    Raises: NothingTrainableError if there is none.
    """
    found: dict[str, tuple[Any, list[str]]] = {}
    first: dict[int, str] = {}
    for name, parameter in parameters:
        known = first.setdefault(id(parameter), name)
        found.setdefault(known, (parameter, []))[1].append(name)
    if not found:
        raise NothingTrainableError(
            "there is no parameter to train: every node with weights is frozen, or none has any; "
            "choose one with set_trainable(path), or add an adapter"
        )
    return found


def parameter_groups(parameters: Iterable[tuple[str, Any]], config: TrainingConfig) -> list[dict[str, Any]]:
    """What an optimizer takes: `{name, params, names, lr, weight_decay}` for each group; the name is a key of `per_path`.

    A parameter may come under several names (`path:name` for each use, `block:KEY:name`); it is in one group. Order is
    that of the parameters. Raises: ConfigError for an entry of `per_path` that meets nothing, and where several meet
    one shared block and differ; NothingTrainableError.
    """
    groups: dict[str, dict[str, Any]] = {}
    unused = set(config.per_path)
    found = unique_parameters(parameters)
    for first, (parameter, names) in found.items():
        key = _claim(names, config, unused)
        chosen = config.per_path.get(key, GroupSettings())
        group = groups.setdefault(key, {
            "name": key, "params": [], "names": [],
            "lr": config.lr if chosen.lr is None else chosen.lr,
            "weight_decay": config.weight_decay if chosen.weight_decay is None else chosen.weight_decay,
        })  # fmt: skip
        group["params"].append(parameter)
        group["names"].append(first)
    if unused:
        wrong = min(unused)
        known = [name.rpartition(":")[0] for _, names in found.values() for name in names]
        raise ConfigError(f"per_path: {wrong!r} meets no parameter that learns; {did_you_mean(wrong, known)}")
    return list(groups.values())


def _claim(names: list[str], config: TrainingConfig, unused: set[str]) -> str:
    """The entry of `per_path` that holds for the parameter with these names."""
    claims: dict[str, str] = {}  # key -> the name that it was found by
    for name in names:
        keys = [key for key in config.per_path if _meets(key, name)]
        unused.difference_update(keys)
        if keys:
            claims.setdefault(max(keys, key=lambda key: (len(key), key)), name)
    by_block = [key for key in claims if key.startswith(BLOCK)]
    if by_block:
        return by_block[0]
    settings = {config.per_path[key].model_dump_json() for key in claims}
    if len(settings) > 1:
        (a, at), (b, by), *_ = claims.items()
        own = next((n for n in names if n.startswith(BLOCK)), BLOCK).rpartition(":")[0]
        raise ConfigError(
            f"per_path: {a!r} and {b!r} set different values for one parameter, {at} and {by}; "
            f"give its block settings of its own: per_path: {{{own!r}: ...}}"
        )
    return min(claims, default=REST)


def _meets(key: str, name: str) -> bool:
    return name == key or name.startswith((f"{key}:", f"{key}/", f"{key}.")) or fnmatchcase(name, key)

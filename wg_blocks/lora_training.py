"""What a LoRA world is trained for and on: its settings as plain data, its examples, and the loss on them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from wg_blocks.corpus import from_text, from_wiki
from wg_blocks.examples import HELD_OUT, TRAIN, Examples, Row, from_history, learners, make
from wg_core.errors import ConfigError
from wg_core.execution.context import derive_seed
from wg_core.levels.training import calling
from wg_core.structure.ids import check_id

if TYPE_CHECKING:
    from wg_core.levels.world import World
    from wg_core.weights.training_config import TrainingConfig

LEAST = 8
"""Rows that a training needs at least."""

PASSES = 2
"""How often each example is learned where neither steps nor minutes are given."""


class LoraSettings(BaseModel):
    """A LoRA world to train, as it is asked for; equal settings on equal examples give equal adapters.

    `sources` are `history`, or text (`.txt`) and MediaWiki (`.xml`) files. `steps` counts updates; `minutes` chooses
    them by a measurement; without either, every example is learned twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sources: tuple[str, ...] = Field(default=("history",), min_length=1)
    stages: tuple[str, ...] = ()
    first: int | None = Field(default=None, ge=0)
    last: int | None = Field(default=None, ge=0)
    held_out: float = Field(default=0.2, gt=0, lt=1)
    rank: int = Field(default=8, ge=1, le=512)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] = Field(default=("role:llm",), min_length=1)
    modules: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    per_stage: bool = False
    steps: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0, le=7 * 24 * 60)
    lr: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=4, ge=1)
    eval_every: int = Field(default=0, ge=0)
    samples: int = Field(default=2, ge=0, le=20)
    seed: int = Field(default=0, ge=0)

    @field_validator("name")
    @classmethod
    def _legal(cls, name: str) -> str:
        return check_id(name, "world id")

    @classmethod
    def of(cls, given: dict[str, Any]) -> LoraSettings:
        """Checked settings. Raises: ConfigError naming each wrong one."""
        import pydantic

        try:
            return cls.model_validate(given)
        except pydantic.ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            raise ConfigError(f"training settings: {wrong}") from None


def gather(world: World, settings: LoraSettings) -> Examples:
    """The examples that the settings ask for, without checks.

    Raises: ConfigError for a world without a model that can learn, an unknown stage or kind of source, FileNotFoundError.
    """
    paths = learners(world)
    if not paths:
        raise ConfigError(
            f"world {world.world_id!r} has no model that can learn: only language models that run here do (llm/hf); "
            "what runs behind an API, and stubs, have no weights"
        )
    drafts: list[Row] = []
    for source in settings.sources:
        after = 1 + max((row["step"] for row in drafts), default=-1)
        drafts += [{**row, "step": row["step"] + after} for row in _rows_of(source, world, settings, list(paths))]
    return make(drafts, held_out=settings.held_out, seed=settings.seed)


def _rows_of(source: str, world: World, settings: LoraSettings, paths: Sequence[str]) -> Iterator[Row]:
    if source == "history":
        return from_history(world, stages=settings.stages, first=settings.first, last=settings.last)
    kinds = {".txt": from_text, ".md": from_text, ".xml": from_wiki}
    read = kinds.get(Path(source).suffix.lower())
    if read is None:
        raise ConfigError(f"source {source!r} is neither 'history' nor a file {', '.join(kinds)}")
    wanted = [*settings.stages, "author"]
    of_stage = [path for stage in wanted for path in paths if path.startswith(f"{stage}/")]
    return read(Path(source), world_id=world.world_id, path=(of_stage or list(paths))[0])


def more_examples(world_id: str, settings: LoraSettings) -> str:
    """How to get more examples, for the message that there are too few."""
    if "history" in settings.sources:
        return f"let the world live: wg run {world_id} --steps {LEAST}; or learn from a text: wg train {world_id} --from FILE.txt"
    return "give a longer text, or add --from history"


def loss_on(world: World) -> Callable[[Sequence[Row]], tuple[Any, int]]:
    """The loss of a batch of rows for `fit`: nats per answer token, each row asked at its own place in the world."""

    def loss(batch: Sequence[Row]) -> tuple[Any, int]:
        by_path: dict[str, list[Row]] = defaultdict(list)
        for row in batch:
            by_path[row["path"]].append(row)
        total, count = None, 0
        for path, rows in by_path.items():
            with calling(world, path) as block:
                mean, tokens = block.answer_loss(rows)
            total, count = mean * tokens if total is None else total + mean * tokens, count + tokens
        assert total is not None, "a batch has rows"
        return total / count, count

    return loss


EVALUATIONS = 2
"""How often the held-out loss is taken in a training, after the one before it."""


def training_config(world: World, settings: LoraSettings, examples: Examples) -> TrainingConfig:
    """How the adapters of a LoRA world are trained; `minutes` are turned into steps by measuring a few on these rows."""
    from wg_core.weights.training_config import TrainingConfig

    steps = settings.steps or math.ceil(PASSES * len(examples.split(TRAIN)) / settings.batch_size)
    if settings.steps is None and settings.minutes is not None:
        steps = _steps_in(world, settings, examples)
    every = settings.eval_every or max(1, math.ceil(steps / EVALUATIONS))
    return TrainingConfig(
        lr=settings.lr, steps=steps, batch_size=settings.batch_size, seed=settings.seed, schedule="cosine", final_lr=0.1,
        warmup=min(10, steps // 10), clip_norm=1.0, eval_every=every, save_every=min(every, max(5, steps // 20)),
    )  # fmt: skip


def _steps_in(world: World, settings: LoraSettings, examples: Examples) -> int:
    """How many updates fit into the minutes, with their evaluations, from a few that teach nothing."""
    loss = loss_on(world)
    rows = sorted(
        examples.split(TRAIN), key=lambda row: derive_seed(settings.seed, "measure", row["step"], row["path"])
    )
    forward: list[float] = []
    whole: list[float] = []
    for number in range(4):
        batch = [rows[(number * settings.batch_size + i) % len(rows)] for i in range(settings.batch_size)]
        started = time.perf_counter()
        found, _ = loss(batch)
        forward.append(time.perf_counter() - started)
        found.backward()
        whole.append(time.perf_counter() - started)
    for parameter in world.trainable_parameters():
        parameter.grad = None
    step, evaluation = sum(whole[1:]) / 3, sum(forward[1:]) / 3 * len(examples.split(HELD_OUT)) / settings.batch_size
    assert settings.minutes is not None
    return max(1, int((settings.minutes * 60 - (EVALUATIONS + 1) * evaluation) / step))


def samples_of(examples: Examples, most: int, seed: int) -> list[Row]:
    """Held-out rows to show before and after, of as many stages as there are."""
    rows = sorted(examples.split(HELD_OUT), key=lambda row: derive_seed(seed, "sample", row["step"], row["path"]))
    by_stage: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_stage[row["stage"]].append(row)
    chosen = [group[i] for i in range(len(rows)) for group in by_stage.values() if i < len(group)]
    return chosen[:most]

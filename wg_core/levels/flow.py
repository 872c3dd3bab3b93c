"""Flow: a step of a world on its way from stage to stage, and what it may still spend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from wg_core.execution.budget import Budget
from wg_core.state.store import StageRecord


class Flow(BaseModel):
    """A step on its way: plain JSON, so that each stage may run in another process.

    `content` is the root hash of the content after the stages so far; `given` the state that the step began with,
    `applied` the full state that World update took in, `dropped` the blocks of a state that was not full. `calls` names
    for each stage the blob with the model calls that it made, `budget` what the whole step may ask of models.
    """

    model_config = ConfigDict(extra="forbid")

    world_id: str
    step: int
    parent: str | None
    epoch: int
    owner: str
    given: dict[str, Any]
    state: dict[str, Any]
    applied: dict[str, Any] | None = None
    dropped: list[str] = []
    content: str
    content_seed: str
    stages: list[StageRecord] = []
    calls: dict[str, str] = {}
    budget: dict[str, int | float] = {}
    action: str | None = None
    seed: int
    config_hash: str
    started: float


def with_budget(options: dict[str, Any]) -> dict[str, Any]:
    """Run options whose budget, if any, is one for all the runs that they are given to. Raises: ConfigError."""
    return {**options, "budget": Budget.of(options["budget"])} if options.get("budget") is not None else options


def step_budget(flow: Flow, run: Budget | Mapping[str, Any] | None) -> Budget | None:
    """What the stage that comes next may use: what is left of the step's budget, and of the run's."""
    if not flow.budget:
        return Budget.of(run)
    spent = [row for record in flow.stages for row in record.usage.values()]
    return Budget(flow.budget, within=Budget.of(run), spent=spent)

"""What a person may ask of one step, checked before the run starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from wg_core.errors import ConfigError
from wg_core.execution.budget import checked_limits
from wg_core.state.forms import BLOCKS
from wg_core.weights.profiling import KINDS

LONGEST_ACTION = 20_000
LARGEST_STATE_FILE = 16 * 2**20
LIMITS = (
    ("calls", int, "Calls of models."),
    ("tokens", int, "Tokens, read and written together."),
    ("cost", float, "Cost, in the unit of the models' prices."),
)


class Launch(dg.Config):
    """The checked form, as the first op of a step receives it."""

    action: str | None = None
    initial_state: dict[str, Any] | None = None
    seed: int | None = None
    budget: dict[str, float] | None = None
    profile: str | None = None
    dry_run: bool = False


def launch_mapping(begin_op: str) -> dg.ConfigMapping:
    """The flat launch form of a step, and its way to the config of `begin_op`."""
    blocks = {name: dg.Field(dg.Permissive(), is_required=False, description=f"Block `{name}`.") for name in BLOCKS}
    schema = {
        "action": dg.Field(
            str,
            default_value="",
            description="What happens from outside, in words, for Development. Empty: the world goes on by itself.",
        ),
        "initial_state": dg.Field(
            dg.Noneable(dg.ScalarUnion(scalar_type=str, non_scalar_schema=blocks)),
            default_value=None,
            description="A state to begin with instead of the carried one: the path of a JSON file, or its blocks.",
        ),
        "seed": dg.Field(
            dg.Noneable(int),
            default_value=None,
            description="0 or more; equal seeds repeat a step. Left out: the world's own, or drawn once and recorded.",
        ),
        "budget": dg.Field(
            {name: dg.Field(dg.Noneable(kind), is_required=False, description=said) for name, kind, said in LIMITS},
            is_required=False,
            description="What the step may ask of models at most; a call that would exceed it is refused. Left out: "
            "the limits of the world's file.",
        ),
        "profile": dg.Field(
            dg.ScalarUnion(scalar_type=bool, non_scalar_schema={"kind": dg.Enum("Profiler", [*map(dg.EnumValue, KINDS)])}),
            default_value=False,
            description="Look where each stage's time goes: true (or kind cpu) writes files for pstats, kind torch traces of "
            "PyTorch's operators; the seconds of all nodes are shown with each stage. The results stay the same.",
        ),
        "dry_run": dg.Field(
            bool,
            default_value=False,
            description="Check the whole cycle without models, network or storage; nothing is made.",
        ),
    }
    return dg.ConfigMapping(config_schema=schema, config_fn=lambda given: {begin_op: {"config": checked(given)}})


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The launch form as plain values, with a state file read. Raises: ConfigError."""
    action, seed, state = (given.get(name) for name in ("action", "seed", "initial_state"))
    if action and len(action) > LONGEST_ACTION:
        raise ConfigError(f"action: {len(action)} characters; the limit is {LONGEST_ACTION}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed: {seed} is outside 0 .. 2**63-1")
    budget = checked_limits(given.get("budget") or {})
    values: dict[str, Any] = {"dry_run": bool(given.get("dry_run", False))}
    if action and action.strip():
        values["action"] = action
    if seed is not None:
        values["seed"] = seed
    if profile := given.get("profile"):
        values["profile"] = "cpu" if profile is True else profile["kind"]
    if budget:
        values["budget"] = {name: float(limit) for name, limit in budget.items()}
    if state is not None:
        values["initial_state"] = _state(state)
    return values


def _state(given: Any) -> dict[str, Any]:
    from wg_core.state.state import State

    where = "initial_state"
    if isinstance(given, str):
        path = Path(given).expanduser()
        where = f"initial_state {path}"
        try:
            if path.stat().st_size > LARGEST_STATE_FILE:
                raise ConfigError(f"{where}: larger than {LARGEST_STATE_FILE} bytes")
            given = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror or error}; give the path of a JSON file") from error
    try:
        return State.from_json(given).to_json()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error

"""What a run may ask of models at most: a call that would exceed it is refused before it is made."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from wg_core.errors import BudgetExceededError, ConfigError, did_you_mean

LIMITS: tuple[str, ...] = ("calls", "tokens", "cost")


class Budget:
    """Limits, `{calls?, tokens?, cost?}`, tokens read and written together, shared by all levels and threads of a run.

    A call is held at its estimate before it is made and settled at what it took. `within` is a budget that is held to
    as well, `spent` what the ledger has already (rows of `{calls, prompt_tokens, completion_tokens, cost}`).
    Raises: ConfigError for an unknown limit, or one that is no number >= 0.
    """

    def __init__(
        self,
        limits: Mapping[str, Any],
        *,
        within: Budget | None = None,
        spent: Iterable[Mapping[str, float]] = (),
    ) -> None:
        self.limits = checked_limits(limits)
        self.within = within
        self._lock = threading.Lock()
        self._spent = dict.fromkeys(LIMITS, 0.0)
        self._held = dict.fromkeys(LIMITS, 0.0)
        for row in spent:
            self._add(self._spent, amount_of(row))

    @classmethod
    def of(cls, given: Budget | Mapping[str, Any] | None) -> Budget | None:
        """The budget of `{calls?, tokens?, cost?}`; a budget as it is. Raises: ConfigError."""
        return given if given is None or isinstance(given, Budget) else cls(given)

    @property
    def spent(self) -> dict[str, float]:
        """Calls, tokens and cost so far."""
        with self._lock:
            return dict(self._spent)

    @property
    def limits_cost(self) -> bool:
        """Whether what calls cost must be known."""
        return "cost" in self.limits or (self.within is not None and self.within.limits_cost)

    def hold(self, what: str, tokens: int, cost: float = 0.0) -> Hold:
        """Hold one call of at most so many tokens. Raises: BudgetExceededError, and then nothing is held."""
        amount = {"calls": 1.0, "tokens": float(tokens), "cost": cost}
        outer = self.within.hold(what, tokens, cost) if self.within is not None else None
        with self._lock:
            for name, limit in self.limits.items():
                used = self._spent[name] + self._held[name]
                if used + amount[name] > limit:
                    if outer is not None:
                        outer.drop()
                    raise BudgetExceededError(
                        f"{what}: this call may take {_number(amount[name])} {name}, and {_number(used)} of the budget of "
                        f"{_number(limit)} {name} are used; raise the budget, or ask for less (params.max_new_tokens)"
                    )
            self._add(self._held, amount)
        return Hold(self, amount, outer)

    def charge(self, row: Mapping[str, float], held: Mapping[str, float] | None = None) -> None:
        """Book what was used; `held` is given back with it."""
        with self._lock:
            self._add(self._spent, amount_of(row))
            for name, value in (held or {}).items():
                self._held[name] -= value
        if held is None and self.within is not None:
            self.within.charge(row)

    @staticmethod
    def _add(total: dict[str, float], amount: Mapping[str, float]) -> None:
        for name in LIMITS:
            total[name] += amount[name]


class Hold:
    """One call that is held; `settle` or `drop` it, once."""

    def __init__(self, budget: Budget, amount: Mapping[str, float], outer: Hold | None) -> None:
        self._budget = budget
        self._amount: Mapping[str, float] | None = amount
        self._outer = outer

    def settle(self, row: Mapping[str, float]) -> None:
        """Book what the call took."""
        if self._amount is not None:
            held, self._amount = self._amount, None
            self._budget.charge(row, held)
            if self._outer is not None:
                self._outer.settle(row)

    def drop(self) -> None:
        """The call was not made."""
        self.settle({})


def amount_of(row: Mapping[str, float]) -> dict[str, float]:
    """A row of the ledger in the words of a budget."""
    tokens = row.get("prompt_tokens", 0) + row.get("completion_tokens", 0)
    return {"calls": row.get("calls", 0), "tokens": tokens, "cost": row.get("cost", 0.0)}


def checked_limits(given: Mapping[str, Any]) -> dict[str, float]:
    """The limits that are set. Raises: ConfigError for an unknown name, or a value that is no number >= 0."""
    limits: dict[str, float] = {}
    for name, value in given.items():
        if name not in LIMITS:
            raise ConfigError(f"budget has no limit {name!r}; {did_you_mean(str(name), LIMITS)}")
        if value is None:
            continue
        whole = name != "cost"
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else (int, float))
            or not 0 <= value < math.inf
        ):
            raise ConfigError(f"budget.{name} is a {'whole ' if whole else ''}number >= 0, not {value!r}")
        limits[name] = value
    return limits


def _number(value: float) -> str:
    return f"{value:.6g}" if value != int(value) else str(int(value))

"""A text adapter: words put before a prompt, chosen by trying candidates. It learns without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wg_core import Block, Port
from wg_core.errors import ConfigError, StateDictError


@dataclass(frozen=True, slots=True)
class PrefixSearch:
    """What a search found: the best text, its score, and the score of each that was tried."""

    best: str
    score: float
    scores: Mapping[str, float]


class TextPrefix(Block):
    """Puts a learned prefix before `text`: what can learn beside a model that gives no gradient, such as one behind an API.

    `prefix` is what it begins with. What was learned is state, saved and loaded like weights; there are no parameters,
    and no optimizer reaches it: see `search`.
    """

    role = "text"
    ports = (Port("text", "in", "text"), Port("prefixed", "out", "text"))

    def __init__(self, *, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"prefixed": f"{self.prefix}\n\n{inputs['text']}" if self.prefix else inputs["text"]}

    def search(self, candidates: Iterable[str], score: Callable[[str], float]) -> PrefixSearch:
        """Try the present prefix and each candidate, and keep the one with the highest score; the present one wins a tie.

        `score` is called once for each with the candidate in place: it runs what the prefix is for, on as many examples
        as it likes, and says how good that was. Nothing but these scores decides; nothing is known between candidates.

        Raises: ConfigError for no candidate, or a score that is no number; the prefix is then as before.
        """
        given = self.prefix
        tried = list(dict.fromkeys([given, *candidates]))
        if len(tried) < 2:
            raise ConfigError("text/prefix: there is no candidate beside the present prefix; give some texts to try")
        scores: dict[str, float] = {}
        try:
            for candidate in tried:
                self.prefix = candidate
                scores[candidate] = value = float(score(candidate))
                if math.isnan(value):
                    raise ConfigError(f"text/prefix: the score of {candidate[:60]!r} is no number")
        except BaseException:
            self.prefix = given
            raise
        self.prefix = max(tried, key=scores.__getitem__)
        self.model_revision += self.prefix != given
        return PrefixSearch(self.prefix, scores[self.prefix], scores)

    def own_state_dict(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state["prefix"], str):
            raise StateDictError(f"text/prefix: its prefix is a text, not {type(state['prefix']).__name__}")
        self.prefix = state["prefix"]

"""What a run asked of models: kept to be read, and to answer the same requests again without any model."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from wg_core.errors import ReplayError


class CallLog:
    """The calls of a run, in order: `{place, model, request, answer, ...}`, plain JSON.

    With `recorded` calls the run is a replay: each request is answered from them (equal requests of one place in
    their order) and no model is asked.
    """

    def __init__(self, recorded: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.replaying = recorded is not None
        self._recorded: dict[str, deque[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        for call in recorded or ():
            self._recorded.setdefault(_key(call["place"], call["model"], call["request"]), deque()).append(dict(call))

    def recall(self, place: str, model: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The recorded answer to `request`, `{answer, ...}`; None where this run is no replay.

        Raises: ReplayError for a request that is not in the record.
        """
        if not self.replaying:
            return None
        with self._lock:
            waiting = self._recorded.get(_key(place, model, request))
            if not waiting:
                raise ReplayError(
                    f"{place}: this request to {model!r} is not among the recorded calls of the step, so the step "
                    "would not run as it did; the world's files, its links or its blocks have changed since: "
                    f"{json.dumps(request, ensure_ascii=False)[:300]}"
                )
            found = waiting.popleft()
            self.calls.append(found)
            return found

    def keep(self, place: str, model: str, request: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        """Put an answer, `{answer, ...}`, into the record; what is given back reads as it will in a replay."""
        answer = json.loads(json.dumps(answer, sort_keys=True))
        made = {"place": place, "model": model, "request": dict(request), **answer}
        with self._lock:
            self.calls.append(made)
        return made

    @property
    def unused(self) -> int:
        """How many recorded calls a replay has not asked for."""
        return sum(len(waiting) for waiting in self._recorded.values())


def _key(place: str, model: str, request: Mapping[str, Any]) -> str:
    return json.dumps([place, model, request], sort_keys=True, ensure_ascii=False)

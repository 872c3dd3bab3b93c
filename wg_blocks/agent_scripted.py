"""An agent that follows a script: tools, sessions and agent loops can be tried without a language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from wg_core.assembly.roles import Agent
from wg_core.errors import ConfigError, StateDictError

SESSION = ("session.turn", "session.messages")


class ScriptedAgent(Agent):
    """Answers with the steps of `script` in turn, from the first again after the last.

    A step is a text (the response), `{"response": ...}`, or `{"tool_calls": [{"tool_id", "arguments", "call_id"?}]}`;
    in texts `{results}` stands for the results of the last tool calls. The session (`messages`, and the place in the
    script) is part of the state; with `memory: run` each call without `tool_results` begins a new one.

    Raises: ConfigError for an empty script, an unknown step form or memory.
    """

    ports = Agent.ports

    def __init__(
        self, *, script: Sequence[Any], memory: str = "persistent", tools: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if memory not in ("persistent", "run"):
            raise ConfigError(f"agent/scripted: memory is 'persistent' or 'run', not {memory!r}")
        if not script:
            raise ConfigError("agent/scripted: script needs at least one step")
        self.script = [_step(i, step) for i, step in enumerate(script)]
        self.memory = memory
        self.tools = list(tools) if tools is not None else None
        self.reset_session()

    def reset_session(self) -> None:
        """Forget all messages and begin the script again."""
        self.turn = 0
        self.messages: list[dict[str, Any]] = []

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        results = inputs.get("tool_results")
        if results is None:
            if self.memory == "run":
                self.reset_session()
            self.messages.append({"role": "user", "content": copy.deepcopy(inputs["context"])})
        else:
            self.messages.append({"role": "tool", "content": copy.deepcopy(list(results))})
        step = copy.deepcopy(self.script[self.turn % len(self.script)])
        for number, call in enumerate(step.get("tool_calls", ())):
            call.setdefault("call_id", f"call_{self.turn}_{number}")
        self.turn += 1
        if isinstance(step.get("response"), str):
            said = [str(r.get("result", r.get("error"))) for r in results or ()]
            step["response"] = step["response"].replace("{results}", ", ".join(said))
        self.messages.append({"role": "assistant", "content": copy.deepcopy(step)})
        return step

    def own_state_dict(self) -> dict[str, Any]:
        return dict(zip(SESSION, (self.turn, copy.deepcopy(self.messages)), strict=True))

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        turn, messages = (state[key] for key in SESSION)
        if isinstance(turn, bool) or not isinstance(turn, int) or turn < 0 or not isinstance(messages, list):
            raise StateDictError(f"block {self.name!r}: session.turn is a whole number and session.messages a list")
        self.turn, self.messages = turn, copy.deepcopy(messages)


def _step(number: int, step: Any) -> dict[str, Any]:
    if isinstance(step, str):
        return {"response": step}
    if isinstance(step, Mapping) and step and set(step) <= {"response", "tool_calls"}:
        calls = step.get("tool_calls", [])
        if isinstance(calls, list) and all(
            isinstance(c, Mapping) and {"tool_id", "arguments"} <= set(c) <= {"tool_id", "arguments", "call_id"}
            for c in calls
        ):
            return copy.deepcopy(dict(step))
    raise ConfigError(
        f"agent/scripted: script[{number}] is a text, {{response: ...}} or {{tool_calls: [{{tool_id, arguments}}]}}, not {step!r}"
    )

"""An agent that is driven by a language model, local or remote."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from wg_blocks.json_schema import problems
from wg_blocks.prompt import Message, clean, context_items
from wg_core import Block, Port
from wg_core.assembly.roles import Agent
from wg_core.errors import ConfigError, OutputContractError, StateDictError
from wg_core.execution.agent import ToolSpec
from wg_core.structure.port import kind_of

SESSION = ("session.messages", "session.number", "session.calls", "session.tokens", "session.trail")
_ROLES = ("user", "assistant", "tool")


class LLMAgent(Agent):
    """Asks a language model for the next tool call or the answer, one at a time, as JSON under a schema.

    `llm` describes the model block (`{block_type, config}`); it is built through the same registry and pool, so agents
    on one model share it and nothing else. `system` begins every conversation and the list of tools follows it;
    `params` go to each call of the model.

    The session keeps at most `history` messages of `history_chars` characters together, the request that is worked on
    always among them. Before `min_calls` tool calls in one request the model may not answer, which makes small models
    look before they speak; after `max_calls`, or `max_tokens` tokens, it may only answer. A tool's result is told in at
    most `result_chars` characters. With `memory: run` every request begins anew.

    With `calling: native` tools are offered to the model as its provider has them (`llm/api`), and it may call several
    at once; of what is over `max_calls` the model is told that it was not run. With `schema`, the default, any model
    block with a `schema` port says one call or the answer at a time.

    `status` says how the request ended: `{ended, calls, tokens, trail}`, where `ended` is `answer`, or `calls` or
    `tokens` if that limit left only the answer, and `trail` lists the calls as `{call_id, tool_id, arguments, error?}`.

    Raises: ConfigError for a bad setting, a model block without the ports of a language model, or tools with a model
    that takes no schema; OutputContractError for an answer that breaks the schema, or calls where only an answer is due.
    """

    ports = (
        *Agent.ports[:3],
        Port("schema", "in", "dict", True, description="JSON schema that the answer obeys; the response is then that object"),
        *Agent.ports[3:],
        Port("status", "out", "dict", True, description="how the request ended, and which tools were called"),
    )

    def __init__(
        self,
        *,
        llm: Mapping[str, Any],
        system: str = "",
        tools: Sequence[str] | None = None,
        calling: str = "schema",
        memory: str = "persistent",
        history: int = 24,
        history_chars: int = 8000,
        result_chars: int = 1200,
        answer_chars: int = 600,
        min_calls: int = 0,
        max_calls: int = 6,
        max_tokens: int | None = None,
        params: Mapping[str, Any] | None = None,
        build: Callable[[Mapping[str, Any]], Block],
    ) -> None:
        super().__init__()
        if memory not in ("persistent", "run"):
            raise ConfigError(f"agent/llm: memory is 'persistent' or 'run', not {memory!r}")
        if calling not in ("schema", "native"):
            raise ConfigError(f"agent/llm: calling is 'schema' or 'native', not {calling!r}")
        limits = {"history": history, "history_chars": history_chars, "result_chars": result_chars, "answer_chars": answer_chars}
        counts: dict[str, Any] = {**limits, "max_calls": max_calls, "max_tokens": 1 if max_tokens is None else max_tokens}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"agent/llm: {name} is a whole number >= 1, not {value!r}")
        if isinstance(min_calls, bool) or not isinstance(min_calls, int) or not 0 <= min_calls <= max_calls:
            raise ConfigError(f"agent/llm: min_calls is a whole number from 0 to max_calls ({max_calls}), not {min_calls!r}")
        self.llm = build(llm)
        index = self.llm.port_index
        if "prompt" not in index.inputs or "text" not in index.outputs:
            raise ConfigError(
                f"agent/llm: {self.llm.name!r} is no language model: it needs an input 'prompt' and an output 'text'"
            )
        if calling == "native" and (not {"tools", "tool_choice", "tool_errors"} <= set(index.inputs) or "tool_calls" not in index.outputs):
            raise ConfigError(f"agent/llm: {self.llm.name!r} has no native tool calls; leave out calling: native")
        self.calling = calling
        self.system = system
        self.tools = list(tools) if tools is not None else None
        self.memory = memory
        self.limits = limits
        self.min_calls = min_calls
        self.max_calls = max_calls
        self.max_tokens = max_tokens
        self.params = dict(params or {})
        self.reset_session()

    def get_sub_blocks(self) -> dict[str, Block]:
        return {"llm": self.llm}

    def reset_session(self) -> None:
        """Forget all messages."""
        self.messages: list[dict[str, Any]] = []
        self.trail: list[dict[str, Any]] = []
        self.number = self.calls = self.tokens = 0

    # ---- one step ----------------------------------------------------------------------------------------------------

    def forward(self, inputs: dict[str, Any]) -> Any:
        results = inputs.get("tool_results")
        if results is None:
            if self.memory == "run":
                self.reset_session()
            self.calls = self.tokens = 0
            self.trail = []
            self.messages += self._unanswered()
            self.messages += clean(_request(inputs["context"]))
        else:
            self.messages += [self._message(result) for result in results]
            for result in (r for r in results if "error" in r):
                called = (c for c in reversed(self.trail) if c["call_id"] == result["call_id"])  # ids may come again in later turns
                for call in islice(called, 1):
                    call["error"] = clean(str(result["error"]))
        self._forget()
        schema = self._schema(inputs.get("schema"))
        asked = self._asked_natively if self.calling == "native" else self._asked
        outputs = self.llm.forward(asked(inputs.get("system"), schema))
        if outputs.__class__ is not dict and inspect.isawaitable(outputs):
            return self._later(outputs, schema)
        return self._answer(outputs, schema)

    async def _later(self, outputs: Awaitable[dict[str, Any]], schema: dict[str, Any] | None) -> dict[str, Any]:
        return self._answer(await outputs, schema)

    def _asked_natively(self, system: str | None, schema: dict[str, Any] | None) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": copy.deepcopy(self.messages)}
        if self.bound:  # also where none may be called: providers refuse a conversation with calls of tools that they are not told
            asked["tools"] = [{"name": t.id, "description": t.description, "parameters": dict(t.parameters)} for t in self.bound]
            asked["tool_choice"] = "none" if self._spent() else "required" if self.calls < self.min_calls else "auto"
            asked["tool_errors"] = "result"
        given = {"system": self.head((), system), "schema": schema, "params": copy.deepcopy(self.params)}
        return {**asked, **{k: v for k, v in given.items() if v}}

    def _asked(self, system: str | None, schema: dict[str, Any] | None) -> dict[str, Any]:
        chat: list[Message] = [
            {"role": m["role"] if m["role"] != "tool" else "user", "content": m["content"]} for m in self.messages
        ]
        head = self.head(self.bound if schema is not None else (), system)
        ports = self.llm.port_index.inputs
        asked: dict[str, Any] = {"prompt": chat}
        if head and "system" in ports:
            asked["system"] = head
        elif head:
            chat.insert(0, {"role": "system", "content": head})
        if schema is not None:
            if "schema" not in ports:
                raise ConfigError(
                    f"agent/llm: {self.llm.name!r} takes no schema, so tool calls cannot be asked of it; "
                    "choose a model block with an input 'schema', or give the agent no tools (tools: [])"
                )
            asked["schema"] = schema
        if self.params:
            asked["params"] = copy.deepcopy(self.params)
        return asked

    def _schema(self, wanted: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What the model may say now: calls of tools, and unless some must come first an answer, in the form `wanted`."""
        if not self.bound or self.calling == "native":
            return copy.deepcopy(dict(wanted)) if wanted is not None else None
        answer: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": self.limits["answer_chars"]}
        if wanted is not None:
            answer = copy.deepcopy(dict(wanted))
        shared = answer.pop("$defs", None)
        forms: list[dict[str, Any]] = []
        if not self._spent():
            for tool in self.bound:
                arguments = copy.deepcopy(dict(tool.parameters))
                forms.append(self.form({"tool": {"type": "string", "const": tool.id}, "arguments": arguments}))
        if not forms or self.calls >= self.min_calls:
            forms.append(self.form({"answer": answer}))
        schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
        return {**schema, "$defs": shared} if shared else schema

    def form(self, properties: Mapping[str, Any]) -> dict[str, Any]:
        """One of the objects that the model may write."""
        return {"type": "object", "properties": {**properties}, "required": [*properties], "additionalProperties": False}

    def _spent(self) -> str:
        """The limit that leaves the model only the answer, if one does."""
        if self.calls >= self.max_calls:
            return "calls"
        return "tokens" if self.max_tokens is not None and self.tokens >= self.max_tokens else ""

    def _answer(self, outputs: Mapping[str, Any], schema: dict[str, Any] | None) -> dict[str, Any]:
        limit = self._spent() if self.bound else ""
        used: Any = outputs.get("usage") or {}
        self.tokens += sum(int(used.get(k) or 0) for k in ("prompt_tokens", "completion_tokens"))
        text = str(outputs["text"])
        if self.calling == "native" and outputs.get("tool_calls"):
            return self._called_natively(text, [dict(call) for call in outputs["tool_calls"]], limit)
        if schema is None:
            self.messages.append({"role": "assistant", "content": text})
            return {"response": text, "status": self._status(limit)}
        said = _parsed(outputs.get("data"), text, schema, self.name)
        self.messages.append({"role": "assistant", "content": json.dumps(said, ensure_ascii=False)})
        if not self.bound or self.calling == "native":
            return {"response": said, "status": self._status(limit)}
        if "answer" in said:
            return {"response": said["answer"], "status": self._status(limit)}
        return self._called([{"call_id": f"call_{self.number + 1}", "tool_id": said["tool"], "arguments": said["arguments"]}])

    def _called_natively(self, text: str, said: list[dict[str, Any]], limit: str) -> dict[str, Any]:
        """The calls that are within the limit; of the others the model is told that they were not run."""
        if limit:
            raise OutputContractError(
                f"{self.name}: the limit of {limit} is reached and the model may only answer, but it calls "
                f"{', '.join(call['name'] for call in said)}; raise max_{limit}, or take a server that knows tool_choice: none"
            )
        self.messages.append({"role": "assistant", "content": text, "tool_calls": said})
        calls: list[dict[str, Any]] = []
        for call in said:
            read = {"call_id": call["id"], "tool_id": call["name"], "arguments": call["arguments"]}
            if len(calls) + self.calls < self.max_calls:
                wrong = "error" in call and not isinstance(call["arguments"], Mapping)  # else the engine's own check counts
                calls.append({**read, "error": call["error"]} if wrong else read)
                continue
            read["error"] = f"not run: at most {self.max_calls} calls answer one request"
            self.messages.append(self._message(read))
            self.trail.append(read)
        return self._called(calls)

    def _called(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        self.calls += len(calls)
        self.number += len(calls)
        self.trail += copy.deepcopy(calls)
        return {"tool_calls": calls}

    def _status(self, limit: str) -> dict[str, Any]:
        return {"ended": limit or "answer", "calls": self.calls, "tokens": self.tokens, "trail": copy.deepcopy(self.trail)}

    def head(self, tools: Sequence[ToolSpec], system: str | None = None) -> str:
        """What stands before every conversation: the system texts, and how to use the tools."""
        return "\n\n".join(filter(None, (self.system, system, _tool_text(tools) if tools else "")))

    # ---- words -------------------------------------------------------------------------------------------------------

    def _message(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """A tool's result as a message."""
        if self.calling == "native":
            told = {"role": "tool", "tool_call_id": result["call_id"], "content": self._told(result)}
            return {**told, "is_error": True} if "error" in result else told
        return {"role": "tool", "content": self._told(result)}

    def _unanswered(self) -> list[dict[str, Any]]:
        """Results for calls of a run that ended before it gave any; providers refuse a conversation with open calls."""
        at = max((i for i, m in enumerate(self.messages) if m.get("tool_calls")), default=len(self.messages))
        given = {m.get("tool_call_id") for m in self.messages[at + 1 :]}
        calls = [c for m in self.messages[at : at + 1] for c in m["tool_calls"] if c["id"] not in given]
        ended = {"error": "the run ended before it gave a result"}
        return [self._message({"call_id": c["id"], "tool_id": c["name"], **ended}) for c in calls]

    def _told(self, result: Mapping[str, Any]) -> str:
        name = f"{result['tool_id']} ({result['call_id']})"
        if "error" in result:
            text = f"{name} failed: {result['error']}"
        else:
            text = f"{name} says: {_plain(result.get('result'))}"
        text = clean(text)
        room = self.limits["result_chars"]
        return text if len(text) <= room else f"{text[:room]}... ({len(text) - room} more characters)"

    def _forget(self) -> None:
        """Drop the oldest messages that are over the limits; the request and what came last stay."""
        request = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=0)

        def over() -> bool:
            size = sum(len(m["content"]) for m in self.messages)
            return len(self.messages) > self.limits["history"] or size > self.limits["history_chars"]

        while over() and len(self.messages) > 2:
            at = 0 if request else 1
            end = at + 1
            while self.messages[at].get("tool_calls") and end < len(self.messages) and self.messages[end]["role"] == "tool":
                end += 1  # calls go with their results; providers refuse the one without the other
            while at == 0 and end < request and self.messages[end]["role"] != "user":
                end += 1  # nor do all of them take a conversation that the user does not begin
            if end >= len(self.messages):
                break
            del self.messages[at:end]
            request -= (end - at) if request else 0

    # ---- state -------------------------------------------------------------------------------------------------------

    def own_state_dict(self) -> dict[str, Any]:
        session = (copy.deepcopy(self.messages), self.number, self.calls, self.tokens, copy.deepcopy(self.trail))
        return dict(zip(SESSION, session, strict=True))

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        messages, *counts, trail = (state[key] for key in SESSION)
        good = isinstance(messages, list) and all(
            isinstance(m, Mapping) and m.get("role") in _ROLES and isinstance(m.get("content"), str) for m in messages
        )
        good = good and isinstance(trail, list) and all(isinstance(call, Mapping) and "call_id" in call for call in trail)
        if not good or not all(type(n) is int and n >= 0 for n in counts):
            raise StateDictError(
                f"block {self.name!r}: session.messages is a list of {{role, content}}, session.trail one of calls; the other "
                "values are whole numbers"
            )
        self.messages, self.trail = copy.deepcopy(messages), copy.deepcopy(trail)
        self.number, self.calls, self.tokens = counts


def _request(context: Any) -> list[dict[str, Any]]:
    """A request as messages: a conversation stays one, all else is one message of the user."""
    if isinstance(context, Sequence) and not isinstance(context, str) and context:
        chat = [dict(m) for m in context if isinstance(m, Mapping) and {"role", "content"} <= set(m)]
        if len(chat) == len(context) and all(m["role"] in _ROLES and isinstance(m["content"], str) for m in chat):
            return [{"role": "user" if m["role"] == "tool" else m["role"], "content": m["content"]} for m in chat]
    if isinstance(context, str):
        text = context
    else:
        items = context_items(context)
        text = "\n".join(f"{i['source']}: {i['text']}" if i["source"] else i["text"] for i in items)
    return [{"role": "user", "content": text}]


def _parsed(data: Any, text: str, schema: Mapping[str, Any], who: str) -> dict[str, Any]:
    if data is None:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise OutputContractError(f"{who}: the model's answer is no JSON: {text[:200]}") from error
    wrong = problems(schema, data)
    if wrong:
        raise OutputContractError(f"{who}: the model's answer is neither a tool call nor an answer: {'; '.join(wrong)}")
    return dict(data)


def _tool_text(tools: Sequence[ToolSpec]) -> str:
    lines = [
        'You can use tools. Say {"tool": NAME, "arguments": {...}} to use one; you are told its result.',
        'Say {"answer": TEXT} as soon as you can answer. The tools are:',
    ]
    for tool in tools:
        takes = ", ".join(_argument(n, s) for n, s in tool.parameters.get("properties", {}).items()) or "nothing"
        lines.append(f"- {tool.id}: {tool.description} Arguments: {takes}.")
    return "\n".join(lines)


def _argument(name: str, schema: Mapping[str, Any]) -> str:
    kind = schema.get("type", "any")
    kind = kind if isinstance(kind, str) else " or ".join(kind)
    values = f", one of {', '.join(map(str, schema['enum']))}" if "enum" in schema else ""
    says = f": {schema['description']}" if schema.get("description") else ""
    return f"{name} ({kind}{values}{says})"


def _plain(value: Any) -> str:
    """A result as the model reads it: passages one a line, else JSON; what is no JSON value is named by its kind."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) and isinstance(v.get("text"), str) for v in value):
        return "".join(f"\n- {v['text']}" for v in value)
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=kind_of)
    except (TypeError, ValueError, RecursionError):  # keys that are no texts, or a value that holds itself
        return kind_of(value)

"""Tool calls on three wires as a provider sees them: what it answers, what it reads, and which requests it refuses.

The rules are those that the providers document:
https://platform.openai.com/docs/guides/function-calling, https://docs.anthropic.com/en/docs/agents-and-tools/tool-use
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

Call = tuple[str, str, str]  # id, name, arguments
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ChatWire:
    """Chat Completions."""

    path = "/chat/completions"
    config: Mapping[str, Any] = {}

    def says(self, text: str | None, *calls: Call, finish: str = "tool_calls") -> dict[str, Any]:
        """A reply with these calls."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
        choice = {"index": 0, "message": message, "finish_reason": finish if calls else "stop"}
        return {"json": {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}}

    def offered(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The schemas of the tools of a request, by name."""
        return {t["function"]["name"]: t["function"]["parameters"] for t in body.get("tools", ())}

    def choice(self, body: Mapping[str, Any]) -> str:
        return body.get("tool_choice", "auto")

    def parts(self, body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """What a conversation consists of: (`user` | `assistant` | `call` | `result`, its value)."""
        for message in body["messages"]:
            allowed = {"role", "content"} | {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}.get(message["role"], set())
            assert set(message) <= allowed, f"unknown parameters: {sorted(set(message) - allowed)}"
            if message["role"] == "tool":
                yield "result", (message["tool_call_id"], message["content"], None)
                continue
            yield message["role"], message["content"]
            for call in message.get("tool_calls", ()):
                assert call["type"] == "function" and isinstance(call["function"]["arguments"], str)
                yield "call", (call["id"], call["function"]["name"], call["function"]["arguments"])


class ResponsesWire(ChatWire):
    """Responses."""

    path = "/responses"
    config: Mapping[str, Any] = {"options": {"wire": "responses"}}

    def says(self, text: str | None, *calls: Call, finish: str = "tool_calls") -> dict[str, Any]:
        output: list[Any] = [{"type": "message", "content": [{"type": "output_text", "text": text}]}] if text else []
        output += [{"type": "function_call", "call_id": i, "name": n, "arguments": a} for i, n, a in calls]
        cut = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}} if finish == "length" else {}
        return {"json": {"status": "completed", "output": output, "usage": {"input_tokens": 11, "output_tokens": 7}, **cut}}

    def offered(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {t["name"]: t["parameters"] for t in body.get("tools", ())}

    def parts(self, body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for item in body["input"]:
            if item.get("type") == "function_call_output":
                yield "result", (item["call_id"], item["output"], None)
            elif item.get("type") == "function_call":
                yield "call", (item["call_id"], item["name"], item["arguments"])
            else:
                yield item["role"], item["content"]


class MessagesWire(ChatWire):
    """Anthropic's Messages."""

    path = "/messages"
    config: Mapping[str, Any] = {"provider": "anthropic"}

    def says(self, text: str | None, *calls: Call, finish: str = "tool_calls") -> dict[str, Any]:
        content: list[Any] = [{"type": "text", "text": text}] if text else []
        for i, name, arguments in calls:
            try:
                given: Any = json.loads(arguments)
            except ValueError:
                given = arguments  # what a server gives on that cannot read it either
            content.append({"type": "tool_use", "id": i, "name": name, "input": given})
        stop = "max_tokens" if finish == "length" else "tool_use" if calls else "end_turn"
        usage = {"input_tokens": 11, "output_tokens": 7}
        return {"json": {"id": "m", "type": "message", "role": "assistant", "content": content, "stop_reason": stop, "usage": usage}}

    def offered(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {t["name"]: t["input_schema"] for t in body.get("tools", ())}

    def choice(self, body: Mapping[str, Any]) -> str:
        return {"any": "required"}.get(kind := body.get("tool_choice", {"type": "auto"})["type"], kind)

    def parts(self, body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for i, message in enumerate(body["messages"]):
            assert message["role"] == ("user", "assistant")[i % 2], f"messages[{i}]: roles alternate, and the user begins"
            kinds = [p["type"] for p in message["content"]]
            assert kinds, f"messages[{i}]: content is empty"
            assert kinds == sorted(kinds, key=lambda k: k != "tool_result"), f"messages[{i}]: tool_result blocks come first"
            for part in message["content"]:
                if part["type"] == "tool_result":
                    yield "result", (part["tool_use_id"], part["content"], part.get("is_error", False))
                elif part["type"] == "tool_use":
                    assert isinstance(part["input"], dict), f"messages[{i}]: input is an object"
                    yield "call", (part["id"], part["name"], json.dumps(part["input"]))
                elif part["type"] == "text":
                    yield message["role"], part["text"]


WIRES = {"chat": ChatWire(), "responses": ResponsesWire(), "messages": MessagesWire()}


def refusal(path: str, body: Any) -> dict[str, Any] | None:
    """The error that a provider gives to a request, None where it is in order or no chat."""
    wire = next((w for w in WIRES.values() if path.split("?")[0].endswith(w.path)), None)
    try:
        if wire is not None:
            _check(wire, body)
    except AssertionError as error:
        return {"status": 400, "json": {"type": "error", "error": {"type": "invalid_request_error", "message": str(error)}}}
    return None


def _check(wire: ChatWire, body: Mapping[str, Any]) -> None:
    """Raises: AssertionError with the reason why a provider refuses the request."""
    tools, choice = wire.offered(body), wire.choice(body)
    assert "tools" not in body or len(tools) == len(body["tools"]) > 0, "tools: none, or two of one name"
    assert choice in ("auto", "none", "required", "tool") and ("tool_choice" not in body or tools), "tool_choice needs tools"
    due: list[str] = []
    open_calls = False  # calls may follow one another, results need all of them before anything else is said
    for kind, value in wire.parts(body):
        if kind == "call":
            assert open_calls or not due, f"calls without results: {due}"
            assert _NAME.fullmatch(value[1]), f"a call has the bad name {value[1]!r}"
            assert value[0] and value[0] not in due, f"two calls of one id {value[0]!r}"
            assert tools or wire.path != "/messages", "requests with tool_use or tool_result blocks must define tools"
            due.append(value[0])
            open_calls = True
        elif kind == "result":
            assert value[0] in due, f"no preceding call {value[0]!r}"
            due.remove(value[0])
            open_calls = False
        else:
            assert not due, f"calls must be followed by their results: {due}"
            open_calls = False
    assert not due, f"calls without results: {due}"

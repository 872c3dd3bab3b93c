"""The provider `anthropic`: the Messages API, through the `anthropic` package (extra `anthropic`).

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from wg_blocks.api.http import HttpProvider
from wg_blocks.api.providers import Chat, Tell, Text, ToolCall
from wg_core.errors import MissingExtraError

try:
    import anthropic
except ImportError as missing:
    raise MissingExtraError(
        "provider anthropic needs its package: pip install 'generative-worlds[anthropic]'"
    ) from missing

PATH = "/v1/messages"
ANSWER = "answer"
_ENDED = {
    "end_turn": True,
    "stop_sequence": True,
    "tool_use": True,
    "max_tokens": False,
    "model_context_window_exceeded": False,
}


class Anthropic(HttpProvider):
    """Chats. A structure is asked for as the one tool that must be called; there is no seed.

    It has no options. `endpoint_url` is without `/v1`, as the package has it.
    """

    name = "anthropic"
    package = anthropic
    own_url = "https://api.anthropic.com"
    own_key = "ANTHROPIC_API_KEY"
    lengths = False
    wire: Mapping[str, str] = {
        "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "stop": "stop_sequences",
        "max_new_tokens": "max_tokens",
    }  # fmt: skip

    def make_sdk(self, **settings: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(open_telemetry=False, **settings)

    def headers(self, key: str | None) -> dict[str, str]:
        return {} if key is None else {"x-api-key": key}

    async def chat(self, chat: Chat, tell: Tell | None = None) -> Text:
        body, wrapped = _body(chat)
        if tell is None:
            return self._read(await self.post(PATH, body), chat, wrapped)
        return await self._stream(chat, body, wrapped, tell)

    def _read(self, answer: Mapping[str, Any], chat: Chat, wrapped: bool) -> Text:
        reason = answer.get("stop_reason")
        if reason == "refusal":
            details = answer.get("stop_details")
            why = details.get("explanation") if isinstance(details, Mapping) else None
            self.wrong(f"the model refused: {str(why or 'it gives no reason')[:500]}")
        if reason not in _ENDED:
            self.wrong(f"its answer is not whole (stop_reason {reason!r})")
        content = answer.get("content")
        if not isinstance(content, list):
            self.wrong(f"its answer has no content (content {type(content).__name__}, stop_reason {reason!r})")
        texts, calls = list[str](), list[ToolCall]()
        for block in content:
            kind = block.get("type") if isinstance(block, Mapping) else None
            if kind == "text" and isinstance(block.get("text"), str):
                texts.append(block["text"])
            elif kind == "tool_use" and all(isinstance(block.get(n), str) for n in ("id", "name")):
                given = block.get("input")
                calls.append(
                    ToolCall(block["id"], block["name"], given if isinstance(given, str) else json.dumps(given))
                )
            elif kind not in ("thinking", "redacted_thinking"):
                self.wrong(f"a part of its answer ({kind!r}) is no text and no tool call")
        text = "".join(texts)
        structured = next((c for c in calls if c.name == _answer(chat)), None) if chat.form is not None else None
        if structured is not None:
            calls.remove(structured)
            text = _unwrapped(structured.arguments) if wrapped else structured.arguments
        return Text(text, _ENDED[str(reason)], *_tokens(answer), tuple(calls))

    async def _stream(self, chat: Chat, body: dict[str, Any], wrapped: bool, tell: Tell) -> Text:
        """The message that the events of a stream make up. Raises: Fault for one without an end."""
        told = self.told(tell)
        message: dict[str, Any] = {"usage": {}}
        blocks: dict[int, dict[str, Any]] = {}
        stopped = False
        async with aclosing(self.events(PATH, {**body, "stream": True})) as events:
            async for event in events:
                kind = event.get("type")
                if kind == "message_start" and isinstance(event.get("message"), Mapping):
                    message |= event["message"]
                elif kind == "content_block_start" and isinstance(event.get("content_block"), Mapping):
                    block = blocks[int(event["index"])] = dict(event["content_block"])
                    if block.get("type") == "tool_use":
                        block["input"] = ""
                elif kind == "content_block_delta" and isinstance(event.get("delta"), Mapping):
                    block, delta = blocks.setdefault(int(event["index"]), {"type": "text", "text": ""}), event["delta"]
                    if delta.get("type") == "text_delta":
                        await told.add(str(delta.get("text") or ""))
                    elif delta.get("type") == "input_json_delta":
                        block["input"] += str(delta.get("partial_json") or "")
                elif kind == "message_delta" and isinstance(event.get("delta"), Mapping):
                    message |= event["delta"]
                    message["usage"] = {**(message.get("usage") or {}), **(event.get("usage") or {})}
                stopped = stopped or kind == "message_stop"
        if not stopped or message.get("stop_reason") is None:
            self.wrong("its stream ended without a stop_reason and message_stop, so the answer is not whole")
        text = await told.end()
        rest = [b for _, b in sorted(blocks.items()) if b.get("type") != "text"]
        return self._read({**message, "content": [{"type": "text", "text": text}, *rest]}, chat, wrapped)


def _body(chat: Chat) -> tuple[dict[str, Any], bool]:
    """The request of a chat, and whether its structure is wrapped as `{"answer": ...}`."""
    messages: list[dict[str, Any]] = []
    system = "\n\n".join(m["content"] for m in chat.messages if m["role"] == "system")
    last = max((i for i, m in enumerate(chat.messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(chat.messages):
        if message["role"] == "system":
            continue
        role, parts = message["role"], list[dict[str, Any]]()
        if role == "tool":
            role = "user"
            told = {"tool_use_id": message["tool_call_id"], "content": message["content"]}
            parts.append({"type": "tool_result", **told, **({"is_error": True} if message.get("is_error") else {})})
        elif message["content"]:
            parts.append({"type": "text", "text": message["content"]})
        for call in message.get("tool_calls") or ():
            given = call["arguments"] if isinstance(call["arguments"], Mapping) else {}  # this wire takes objects alone
            parts.append({"type": "tool_use", "id": call["id"], "name": call["name"], "input": given})
        if i == last:
            parts += [_image(png) for png in chat.images]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": role, "content": parts})
    body: dict[str, Any] = {"model": chat.model, "messages": messages, **chat.settings, **chat.extra}
    if system:
        body["system"] = system
    tools = [
        {"name": t["name"], "description": t.get("description", ""), "input_schema": t["parameters"]}
        for t in chat.tools
    ]
    wrapped = False
    if chat.form is not None and chat.form["type"] == "json_schema":
        schema, wrapped = _as_object(chat.form["schema"])
        tool = {"name": _answer(chat), "description": "Give the answer.", "input_schema": schema}
        if chat.form["strict"]:
            tool |= {"input_schema": anthropic.transform_schema(schema), "strict": True}
        tools.append(tool)
        may_call = chat.tools and chat.tool_choice != "none"
        choice = {"type": "any"} if may_call else {"type": "tool", "name": _answer(chat), "disable_parallel_tool_use": True}
        body["tool_choice"] = choice
    elif tools and chat.tool_choice != "auto":
        body["tool_choice"] = {"type": "any" if chat.tool_choice == "required" else "none"}
    if tools:
        body["tools"] = tools
    return body, wrapped


def _answer(chat: Chat) -> str:
    """The name of the tool that gives the structure; no other tool has it."""
    names = {tool["name"] for tool in chat.tools}
    return next(n for n in (ANSWER + "_" * i for i in range(len(names) + 1)) if n not in names)


def _image(png: bytes) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png).decode()}
    return {"type": "image", "source": source}


def _as_object(schema: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A schema for the arguments of a tool, which are an object; what is none is wrapped."""
    if schema.get("type") == "object":
        return dict(schema), False
    inner = {k: v for k, v in schema.items() if k != "$defs"}
    outer = {"type": "object", "properties": {"answer": inner}, "required": ["answer"], "additionalProperties": False}
    return {**outer, **({"$defs": schema["$defs"]} if "$defs" in schema else {})}, True


def _unwrapped(arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return json.dumps(value["answer"]) if isinstance(value, dict) and set(value) == {"answer"} else arguments


def _tokens(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens read, with those that the provider's cache wrote and read, and tokens written."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    names = (("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"), ("output_tokens",))
    prompt, completion = (
        sum(n for n in map(usage.get, some) if isinstance(n, int) and not isinstance(n, bool) and n > 0)
        for some in names
    )
    return prompt, completion

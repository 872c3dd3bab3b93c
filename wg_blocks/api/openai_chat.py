"""OpenAI's Chat Completions: a chat as a request, and the answer, whole or as a stream.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from wg_blocks.api.http import HttpProvider, counted
from wg_blocks.api.pictures import data_url
from wg_blocks.api.providers import Chat, Tell, Text, ToolCall
from wg_blocks.api.tool_calls import arguments_text

PATH = "/chat/completions"


def settings(own: bool) -> dict[str, str]:
    """Names of settings; compatible servers know the older name of the limit of tokens."""
    tokens = "max_completion_tokens" if own else "max_tokens"
    same = {n: n for n in ("temperature", "top_p", "stop", "seed")}
    return {**same, "max_new_tokens": tokens}


def body(chat: Chat) -> dict[str, Any]:
    """The request of a chat."""
    messages = [_message(m) for m in chat.messages]
    if chat.images:
        at = max(i for i, m in enumerate(messages) if m["role"] == "user")
        parts: list[Any] = [{"type": "text", "text": messages[at]["content"]}]
        parts += [{"type": "image_url", "image_url": {"url": data_url(png)}} for png in chat.images]
        messages[at] = {"role": "user", "content": parts}
    out: dict[str, Any] = {"model": chat.model, "messages": messages, **chat.settings, **chat.extra}
    if chat.tools:
        out["tools"] = [{"type": "function", "function": dict(tool)} for tool in chat.tools]
        out |= {"tool_choice": chat.tool_choice} if chat.tool_choice != "auto" else {}
    if chat.form is not None and chat.form["type"] == "json_schema":
        named = {"name": "answer", "schema": chat.form["schema"], "strict": chat.form["strict"]}
        out["response_format"] = {"type": "json_schema", "json_schema": named}
    elif chat.form is not None:
        out["response_format"] = {"type": "json_object"}
    return out


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    out = {k: v for k, v in message.items() if k != "is_error"}  # an error is told in the text
    if message.get("tool_calls"):
        out["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": arguments_text(call)},
            }
            for call in message["tool_calls"]
        ]
    return out


def read(provider: HttpProvider, answer: Mapping[str, Any]) -> Text:
    """The text of an answer. Raises: Fault for one that is no result."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        provider.wrong("its answer has no choices")
    message, finish = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        provider.wrong("its answer has no message")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    given = message.get("tool_calls") or []
    if not isinstance(given, list):
        provider.wrong(f"its answer has tool_calls that are no list but {type(given).__name__}")
    calls = tuple(_call(provider, call) for call in given)
    return _ended(provider, content, message.get("refusal"), finish, calls, counted(answer))


def _call(provider: HttpProvider, call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not all(
        isinstance(v, str) for v in (call.get("id"), function.get("name"), function.get("arguments"))
    ):
        provider.wrong("a tool call of its answer has no id, name or arguments")
    return ToolCall(call["id"], function["name"], function["arguments"])


def _ended(
    provider: HttpProvider,
    content: Any,
    refusal: Any,
    finish: Any,
    calls: tuple[ToolCall, ...],
    tokens: tuple[int, int],
) -> Text:
    if refusal:
        provider.wrong(f"the model refused: {str(refusal)[:500]}")
    if finish == "content_filter":
        provider.wrong("the provider's content filter stopped the answer (finish_reason content_filter)")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        provider.wrong(f"its answer has no text (content {type(content).__name__}, finish_reason {finish!r})")
    return Text(content, finish != "length", *tokens, calls)


async def stream(provider: HttpProvider, chat: Chat, tell: Tell) -> Text:
    """The text of a stream, told as it comes. Raises: Fault for one that has no end."""
    told, refusal, finish = provider.told(tell), "", None
    parts: dict[int, dict[str, str]] = {}
    tokens = (0, 0)
    asked = {**body(chat), "stream": True, "stream_options": {"include_usage": True}}
    async with aclosing(provider.events(PATH, asked)) as events:
        async for event in events:
            if isinstance(event.get("usage"), Mapping):
                tokens = counted(event)
            choices = event.get("choices")
            for choice in choices if isinstance(choices, list) else ():
                delta = choice.get("delta") if isinstance(choice, Mapping) else None
                if not isinstance(delta, Mapping):
                    provider.wrong("an event of its stream has no delta")
                if choice.get("index"):  # another answer to the same chat, asked for by extra_body
                    continue
                if isinstance(delta.get("content"), str):
                    await told.add(delta["content"])
                refusal += str(delta.get("refusal") or "")
                _add_calls(provider, parts, delta.get("tool_calls") or ())
                finish = choice.get("finish_reason") or finish
    if finish is None:
        provider.wrong("its stream ended without a finish_reason, so the answer is not whole")
    calls = tuple(ToolCall(p["id"], p["name"], p["arguments"]) for _, p in sorted(parts.items()))
    return _ended(provider, await told.end(), refusal, finish, calls, tokens)


def _add_calls(provider: HttpProvider, parts: dict[int, dict[str, str]], deltas: Any) -> None:
    """Join pieces of tool calls, which come by index."""
    for delta in deltas:
        function = delta.get("function") if isinstance(delta, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(delta.get("index"), int):
            provider.wrong("a tool call of its stream has no index or function")
        part = parts.setdefault(delta["index"], {"id": "", "name": "", "arguments": ""})
        part["id"] = part["id"] or str(delta.get("id") or "")
        part["name"] = part["name"] or str(function.get("name") or "")
        part["arguments"] += str(function.get("arguments") or "")

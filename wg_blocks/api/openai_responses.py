"""OpenAI's Responses: a chat as a request, and the answer, whole or as a stream. Nothing is kept at the server.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from wg_blocks.api.http import HttpProvider, counted
from wg_blocks.api.pictures import data_url
from wg_blocks.api.providers import Chat, Tell, Text, ToolCall
from wg_blocks.api.tool_calls import arguments_text

PATH = "/responses"
_END = ("response.completed", "response.incomplete", "response.failed")


def settings(own: bool) -> dict[str, str]:
    """Names of settings; this wire has no seed and no stop texts."""
    return {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "max_output_tokens"}


def body(chat: Chat) -> dict[str, Any]:
    """The request of a chat; servers differ in whether they stream unasked."""
    items: list[dict[str, Any]] = []
    last = max((i for i, m in enumerate(chat.messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(chat.messages):
        if message["role"] == "tool":
            output = {"call_id": message["tool_call_id"], "output": message["content"]}
            items.append({"type": "function_call_output", **output})
            continue
        content: Any = message["content"]
        if chat.images and i == last:
            content = [{"type": "input_text", "text": content}]
            content += [{"type": "input_image", "image_url": data_url(png)} for png in chat.images]
        if content:
            items.append({"role": message["role"], "content": content})
        for call in message.get("tool_calls") or ():
            said = {"name": call["name"], "arguments": arguments_text(call)}
            items.append({"type": "function_call", "call_id": call["id"], **said})
    out: dict[str, Any] = {"model": chat.model, "input": items, "store": False, "stream": False, **chat.settings, **chat.extra}
    if chat.tools:
        out["tools"] = [{"type": "function", **tool, "strict": False} for tool in chat.tools]
        out |= {"tool_choice": chat.tool_choice} if chat.tool_choice != "auto" else {}
    if chat.form is not None and chat.form["type"] == "json_schema":
        named = {"name": "answer", "schema": chat.form["schema"], "strict": chat.form["strict"]}
        out["text"] = {"format": {"type": "json_schema", **named}}
    elif chat.form is not None:
        out["text"] = {"format": {"type": "json_object"}}
    return out


def read(provider: HttpProvider, answer: Mapping[str, Any]) -> Text:
    """The text of an answer. Raises: Fault for one that is no result."""
    status, details = answer.get("status"), answer.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, Mapping) else None
    if status not in ("completed", "incomplete") or (status == "incomplete" and reason != "max_output_tokens"):
        if reason == "content_filter":
            provider.wrong("the provider's content filter stopped the answer (incomplete: content_filter)")
        provider.wrong(f"its answer is not whole (status {status!r}, reason {reason!r})")
    output = answer.get("output")
    if not isinstance(output, list):
        provider.wrong("its answer has no output")
    text, calls = "", list[ToolCall]()
    for item in output:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "function_call":
            fields = [item.get(n) for n in ("call_id", "name", "arguments")]
            if not all(isinstance(f, str) for f in fields):
                provider.wrong("a tool call of its answer has no call_id, name or arguments")
            calls.append(ToolCall(*fields))
        elif kind == "message":
            content = item.get("content")
            for part in content if isinstance(content, list) else ():
                if isinstance(part, Mapping) and part.get("type") == "refusal":
                    provider.wrong(f"the model refused: {str(part.get('refusal'))[:500]}")
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                    provider.wrong("a part of its answer has no text")
                text += part["text"]
    said = any(isinstance(i, Mapping) and i.get("type") == "message" for i in output)
    if status == "completed" and not calls and not said:
        provider.wrong("its answer has no message")
    return Text(text, status == "completed", *counted(answer), tuple(calls))


async def stream(provider: HttpProvider, chat: Chat, tell: Tell) -> Text:
    """The text of a stream, told as it comes; the response that ends it counts. Raises: Fault for one without."""
    told = provider.told(tell)
    async with aclosing(provider.events(PATH, {**body(chat), "stream": True})) as events:
        async for event in events:
            kind = event.get("type")
            if kind == "response.output_text.delta" and isinstance(event.get("delta"), str):
                await told.add(event["delta"])
            elif kind == "error":
                provider.wrong(f"its stream ended in an error: {str(event.get('message'))[:500]}")
            elif kind in _END and isinstance(event.get("response"), Mapping):
                await told.end()
                whole = read(provider, event["response"])
                clean = provider.redact(whole.text)
                return Text(clean, whole.ended, whole.prompt_tokens, whole.completion_tokens, whole.tool_calls)
    provider.wrong("its stream ended without a response.completed, so the answer is not whole")

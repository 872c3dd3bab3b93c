"""A language model behind an API: the same ports as a local one, answers that obey a JSON schema."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, TypeVar

from wg_blocks.api.base import ApiBlock, ApiConfig, Asking, ChatConfig, estimate, no_number, sha
from wg_blocks.api.providers import Chat, Provider, Tell, Text, ToolCall
from wg_blocks.api.strict import strict_form, without_nulls
from wg_blocks.api.tool_calls import CHOICES, ERRORS, TOOL_PORTS, checked_tools, one_of, read_calls
from wg_blocks.json_schema import problems
from wg_blocks.prompt import (
    LLM_PORTS,
    Message,
    Settings,
    answers_in_pieces,
    clean,
    conversations,
    pack,
    whole_sentences,
    with_context,
)
from wg_core import Port
from wg_core.errors import ApiResponseError, OutputContractError
from wg_core.execution.context import derive_seed, drained

_log = logging.getLogger("wg_blocks.api")

_HERE = ("context_tokens", "max_repairs", "whole_sentences", "seed")  # settings that never go to the server by name
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")  # names of the limit of tokens
_SEEDS = 2**31  # servers differ in how large a seed they take; all take this


Answer = TypeVar("Answer")


class ApiChat(ApiBlock):
    """One completion of each chat; with a `schema` the answer comes parsed as `data`.

    Of `params` (see `Settings`) those that were given are sent, and always the seed and the limit of tokens. Decoding
    settings that the server does not know by name (`wire`) are left to it, which is logged.

    Raises: what `ApiBlock` raises, ConfigError for an unknown setting or a bad schema, OutputContractError with the
    text where no attempt obeyed the schema.
    """

    config_model: ClassVar[type[ApiConfig]] = ChatConfig

    def __init__(self, block_id: str | None = None, *, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(block_id, config=config)
        self._told: set[str] = set()

    def complete(
        self, inputs: Mapping[str, Any], images: Sequence[bytes] = (), *, stream: bool = False
    ) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """`{text, usage, data?, tool_calls?}` for the inputs; `images` (PNG) are shown with each prompt.

        With `stream` pieces of the text come on the way where they can be relied on: for one chat, without a schema
        and without tools, whose answers may have to be asked for again.
        """
        params = dict(inputs.get("params") or {})
        tools = checked_tools(inputs.get("tools") or (), self.name)
        choice = one_of(inputs.get("tool_choice"), CHOICES, f"{self.name}: tool_choice")
        told = one_of(inputs.get("tool_errors"), ERRORS, f"{self.name}: tool_errors")
        alone = conversations(inputs)[1] is False and inputs.get("schema") is None and not tools
        complete = partial(
            self._complete, params=params, images=images, tools=tools, choice=choice, tell=told == "result",
            stream=stream and alone,
        )  # fmt: skip
        more: dict[str, Any] = {"images": [sha(i) for i in images]} if images else {}
        more |= {"tools": tools} if tools else {}
        more |= {name: inputs[name] for name in ("tool_choice", "tool_errors") if inputs.get(name) and tools}
        return answers_in_pieces(inputs, self.model, complete, more=more)

    def estimate_tokens(self, text: str) -> tuple[int, str]:
        """Tokens of a text, and how they were counted: by words, as the model's tokenizer is elsewhere."""
        return estimate(text), "words"

    def _complete(
        self,
        chat: Sequence[Message],
        items: Sequence[Mapping[str, str]],
        schema: Any,
        settings: Settings,
        seed: int,
        *,
        params: Mapping[str, Any],
        images: Sequence[bytes],
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        tell: bool,
        stream: bool,
    ) -> Generator[dict[str, Any], None, dict[str, Any]]:
        lines = pack(items, settings.context_tokens, estimate)
        messages = with_context(list(chat), lines)
        form, wrapped = None, False
        if schema is not None:
            form, wrapped = self._form(schema)
            if form is None or form["type"] == "json_object":
                messages = _told_in_words(messages, schema)
        usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        usage |= {"context_items": len(lines), "context_dropped": len(items) - len(lines)}
        written, wrong, again = "", ["no attempt was made"], list(messages)
        tried = 1 + (settings.max_repairs if schema is not None or tools else 0)
        for attempt in range(tried):
            room = settings.max_new_tokens * (2 + attempt) // 2
            sent = self._settings(settings, params, room, derive_seed(seed, attempt) % _SEEDS)
            asking = Chat(self.api.model_id, again, sent, seed, form, images, self.api.extra_body, tools, choice)
            answer, counts = yield from _as_text(
                self.ask(_request(asking, schema), partial(_ask, asking), stream=stream)
            )
            usage |= {name: usage[name] + number for name, number in counts.items()}
            written = clean(answer.text)
            kept = {"messages": [dict(m) for m in messages], "usage": usage}
            if answer.tool_calls:
                calls, wrong = read_calls(answer.tool_calls, tools)
                if wrong and not answer.ended:
                    wrong.append("the answer broke off at the limit of tokens")
                    calls = [c | ({"error": f"{c['error']}; {wrong[-1]}"} if "error" in c else {}) for c in calls]
                if not wrong or tell:
                    return {"answer": written.strip(), "tool_calls": calls, **kept}
                written = written or json.dumps([asdict(c) for c in answer.tool_calls], ensure_ascii=False)
            elif schema is None:
                if not written.strip():
                    raise ApiResponseError(
                        f"{self.model}: the model wrote nothing; raise params.max_new_tokens ({room})"
                    )
                return {"answer": _finished(written, answer.ended, settings), **kept}
            else:
                value, wrong = _read(written, schema, wrapped, answer.ended)
                if not wrong:
                    return {"answer": json.dumps(value, ensure_ascii=False), **kept}
            again = [*messages, *_please(written, wrong)] if answer.ended else list(messages)
        raise OutputContractError(
            f"{self.model} gave no valid structure in {tried} attempts: {'; '.join(wrong)}; "
            f"raise params.max_repairs or params.max_new_tokens, or change structure. It wrote: {written[:2000]}"
        )

    def _form(self, schema: Mapping[str, Any]) -> tuple[dict[str, Any] | None, bool]:
        """How the structure is asked for, and whether the answer will be wrapped."""
        how = self.api.structure
        if how == "prompt":
            return None, False
        if how == "json_object":
            return {"type": "json_object"}, False
        wanted = how == "strict" or (how == "auto" and self.provider().strict)
        strict = strict_form(schema, lengths=how == "auto" and self.provider().lengths) if wanted else None
        if strict is None:
            return {"type": "json_schema", "schema": dict(schema), "strict": how == "strict"}, False
        return {"type": "json_schema", "schema": strict[0], "strict": True}, strict[1]

    def _settings(self, settings: Settings, params: Mapping[str, Any], room: int, seed: int) -> dict[str, Any]:
        """The settings of a request under the server's names."""
        wire = {**self.provider().wire, **self.api.wire}
        given = {"max_new_tokens" if name == "max_tokens" else name for name in params} - set(_HERE)
        values = {name: getattr(settings, name) for name in given} | {"max_new_tokens": room, "seed": seed}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v != ()}
        unknown = sorted(k for k in values if k not in wire)
        if unknown and not self._told >= set(unknown):
            self._told.update(unknown)
            _log.warning(
                "%s: the server decodes by itself, params %s have no effect; if it knows them, name them in wire",
                self.model, ", ".join(unknown),
            )  # fmt: skip
        return {wire[k]: v for k, v in values.items() if wire.get(k) is not None}


class ApiLLM(ApiChat):
    """A language model behind an API; `tools` are offered natively and its calls come out as `tool_calls`."""

    role = "llm"
    ports: Sequence[Port] = (*LLM_PORTS, *TOOL_PORTS)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return drained(self.complete(inputs))

    def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        return self.complete(inputs, stream=True)


class OpenAILLM(ApiLLM):
    """A language model of OpenAI, or behind any server that speaks its HTTP API: `provider` is `openai` unless said."""

    default_provider = "openai"


class AnthropicLLM(ApiLLM):
    """A language model of Anthropic, or behind a server that speaks Messages: `provider` is `anthropic` unless said."""

    default_provider = "anthropic"


def _request(asking: Chat, schema: Any) -> Asking[Text]:
    """A chat as one request."""
    shown = {"messages": [dict(m) for m in asking.messages], "schema": schema, "settings": asking.settings}
    shown |= {"tools": list(asking.tools), "tool_choice": asking.tool_choice} if asking.tools else {}
    offered = json.dumps([asking.form, list(asking.tools)]) if asking.form or asking.tools else ""
    prompt = sum(estimate(str(m["content"])) for m in asking.messages) + estimate(offered)

    def tokens(answer: Text) -> tuple[int, int]:
        """As the server counted them; where it did not, as they are estimated: what is not known is not free."""
        written = (answer.text, *(call.arguments for call in answer.tool_calls))
        return answer.prompt_tokens or prompt, answer.completion_tokens or sum(map(estimate, written))

    return Asking(
        request={**shown, "seed": asking.seed, "form": asking.form, "images": [sha(i) for i in asking.images]},
        shown=shown,
        prompt_tokens=prompt,
        completion_tokens=next((v for k, v in asking.settings.items() if k in _LIMITS), 0),
        tokens=tokens,
        show=lambda answer: clean(answer.text),
        to_json=asdict,
        of_json=lambda kept: Text(**{**kept, "tool_calls": tuple(ToolCall(**c) for c in kept["tool_calls"])}),
    )


def _as_text(pieces: Generator[str, None, Answer]) -> Generator[dict[str, Any], None, Answer]:
    """Pieces keyed by the port that they are of."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            return stop.value
        try:
            yield {"text": clean(piece)}
        except BaseException:
            pieces.close()
            raise


async def _ask(chat: Chat, provider: Provider, tell: Tell | None = None) -> Text:
    return await provider.chat(chat, tell)


def _read(text: str, schema: Mapping[str, Any], wrapped: bool, ended: bool) -> tuple[Any, list[str]]:
    """The value that was written, and what is wrong with it."""
    if not ended:
        return None, ["it broke off at the limit of tokens"]
    fenced = _FENCE.fullmatch(text)
    try:
        value = clean(json.loads(fenced[1] if fenced else text, parse_constant=no_number))
    except (ValueError, RecursionError) as error:
        return None, [f"no JSON: {error}"]
    if wrapped and isinstance(value, dict) and set(value) == {"answer"}:
        value = value["answer"]
    wrong = problems(schema, value)
    if wrong:
        shorter = without_nulls(value)
        if shorter != value and not problems(schema, shorter):
            return shorter, []
    return value, wrong


def _please(written: str, wrong: Sequence[str]) -> list[Message]:
    told = f"That answer cannot be used: {'; '.join(wrong)}. Answer again, with JSON only, as it was asked for."
    return [{"role": "assistant", "content": written[:8000] or "(nothing)"}, {"role": "user", "content": told}]


def _told_in_words(chat: Sequence[Message], schema: Any) -> list[Message]:
    told = f"Answer with JSON only, which obeys this JSON schema:\n{json.dumps(schema, ensure_ascii=False)}"
    if chat[0]["role"] == "system":
        return [{"role": "system", "content": f"{chat[0]['content']}\n\n{told}"}, *chat[1:]]
    return [{"role": "system", "content": told}, *chat]


def _finished(text: str, ended: bool, settings: Settings) -> str:
    """A free answer without what follows a stop text, and to the last whole sentence if it broke off."""
    cut = min((at for at in map(text.find, settings.stop) if at >= 0), default=None)
    if cut is not None:
        return text[:cut].strip()
    text = text.strip()
    if settings.whole_sentences and not ended:
        return whole_sentences(text)
    return text

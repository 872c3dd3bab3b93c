"""From the ports of a language model block to chat messages: prompts, context that is packed whole, settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from wg_blocks.json_schema import check_schema
from wg_core import Port, current_context
from wg_core.errors import ConfigError, PortValueError, did_you_mean
from wg_core.execution.context import derive_seed, drained, whole

LLM_PORTS = (
    Port("prompt", "in", "text|list", description="a text, a list of texts (a batch), or a list of {role, content}"),
    Port(
        "context",
        "in",
        "text|list|dict",
        optional=True,
        aggregation="concat",
        description="ranked {text, source}",
    ),
    Port("system", "in", "text", optional=True),
    Port("schema", "in", "dict", optional=True, description="JSON schema that the answer obeys"),
    Port(
        "params",
        "in",
        "dict",
        optional=True,
        description="call settings: temperature, max_new_tokens, seed, ...",
    ),
    Port("text", "out", "text|list", aliases=("output", "response"), streamable=True),
    Port(
        "token_ids",
        "out",
        "tensor",
        optional=True,
        description="the tokens that were written, before the text was trimmed: int64 [B,L]; from models on this machine",
    ),
    Port("data", "out", "dict|list|any", optional=True, description="the parsed answer, when a schema is given"),
    Port("usage", "out", "dict", optional=True),
)

Message = dict[str, Any]

_MESSAGE = ("role", "content", "tool_calls", "tool_call_id", "is_error")  # the last three where tools were called


@dataclass(frozen=True, slots=True)
class Settings:
    """How one call samples; `params` of the call override these.

    `temperature` 0 takes the likeliest token. `repetition_penalty` divides the scores of words written before;
    `no_repeat_ngram` N > 0 keeps the answer from copying N tokens in a row out of the prompt or out of itself.
    `context_tokens` is the room for context items, `max_repairs` how often a broken structure is written again.
    `stop` texts end a free answer and are left out; with `whole_sentences` one that runs out of tokens ends at its last
    full sentence.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.15
    no_repeat_ngram: int = 0
    max_new_tokens: int = 256
    context_tokens: int = 768
    max_repairs: int = 2
    seed: int | None = None
    stop: tuple[str, ...] = ()
    whole_sentences: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> Settings:
        """Settings from a call's `params`; `max_tokens` is read as `max_new_tokens`.

        Raises: ConfigError naming a key that is unknown or a value out of range.
        """
        given = dict(params or {})
        if "max_tokens" in given:
            given.setdefault("max_new_tokens", given.pop("max_tokens"))
        names = [f.name for f in fields(cls)]
        for key, value in given.items():
            if key not in names:
                raise ConfigError(f"params.{key} is not a setting of this model; {did_you_mean(str(key), names)}")
            if key == "stop":
                texts = (value,) if isinstance(value, str) else value
                good = isinstance(texts, (list, tuple)) and all(isinstance(s, str) and s for s in texts)
                given[key] = tuple(texts) if good else value
            elif key == "whole_sentences":
                good = isinstance(value, bool)
            elif key == "seed":
                good = value is None or (isinstance(value, int) and not isinstance(value, bool))
            else:
                low, high = _RANGES[key]
                whole = key in _WHOLE
                good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
                good = good and low <= value <= high
            if not good:
                allowed = f"; it lies in {_RANGES[key][0]}..{_RANGES[key][1]}" if key in _RANGES else ""
                raise ConfigError(f"params.{key} cannot be {value!r}{allowed}")
        return cls(**given)


_WHOLE = {"top_k", "no_repeat_ngram", "max_new_tokens", "context_tokens", "max_repairs"}
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 5),
    "top_p": (0.01, 1),
    "top_k": (0, 100_000),
    "repetition_penalty": (0.5, 3),
    "no_repeat_ngram": (0, 64),
    "max_new_tokens": (1, 32_768),
    "context_tokens": (0, 1_000_000),
    "max_repairs": (0, 5),
}


def conversations(inputs: Mapping[str, Any]) -> tuple[list[list[Message]], bool]:
    """The chats that the inputs ask for, without context, and whether they are a batch (answers come as a list).

    Raises: PortValueError for a prompt that is none of the three forms.
    """
    prompt, system = inputs["prompt"], inputs.get("system")
    if isinstance(prompt, str):
        chats, batch = [[{"role": "user", "content": prompt}]], False
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(p, str) for p in prompt):
        chats, batch = [[{"role": "user", "content": p}] for p in prompt], True
    elif isinstance(prompt, Sequence) and prompt and all(_is_message(p) for p in prompt):
        chats, batch = [[{k: p[k] for k in _MESSAGE if k in p} for p in prompt]], False
    elif isinstance(prompt, Sequence) and not prompt:
        return [], True
    else:
        raise PortValueError("prompt is a text, a list of texts, or a list of {role, content} with text content")
    if system:
        for chat in chats:
            if chat[0]["role"] == "system":
                chat[0] = {"role": "system", "content": f"{system}\n\n{chat[0]['content']}"}
            else:
                chat.insert(0, {"role": "system", "content": system})
    return clean(chats), batch


def asked(
    chat: Sequence[Message], items: Sequence[Mapping[str, str]], schema: Any, settings: Settings, seed: int
) -> dict[str, Any]:
    """One call as it is asked, before anything is packed or counted: all that decides the answer, as plain JSON."""
    how = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "seed"}
    return {
        "messages": [dict(m) for m in chat],
        "context": [dict(i) for i in items],
        "schema": schema,
        "settings": {**how, "stop": list(settings.stop)},
        "seed": seed,
    }


_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")


def clean(value: Any) -> Any:
    """Text, or JSON with texts, without what no UTF-8 file can hold: NUL and lone surrogates become U+FFFD."""
    if isinstance(value, str):
        return _UNWRITABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [clean(v) for v in value]
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    return value


def tally(total: Mapping[str, int] | None = None, more: Mapping[str, int] | None = None) -> dict[str, int]:
    """The `usage` of a block's calls so far: calls and tokens add up, the context is that of the last call."""
    counted = {n: 0 for n in ("calls", "prompt_tokens", "completion_tokens", "context_items", "context_dropped")}
    counted |= dict(total or {})
    for name, number in (more or {}).items():
        counted[name] = number if name.startswith("context_") else counted[name] + number
    return counted


Complete = Callable[[list[Message], list[dict[str, str]], Any, Settings, int], dict[str, Any]]
InPieces = Callable[
    [list[Message], list[dict[str, str]], Any, Settings, int], Generator[dict[str, Any], None, dict[str, Any]]
]
Together = Callable[
    [list[list[Message]], list[dict[str, str]], Any, Settings, list[int]], Generator[Any, Any, list[dict[str, Any]]]
]


def answers(
    inputs: Mapping[str, Any], model: str, complete: Complete, *, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The outputs of a language model block: one completion of each chat, asked through the run's record of calls.

    `complete(chat, context items, schema, settings, seed)` gives `{answer, usage, tool_calls?, token_ids?, pad_id?}`,
    where `pad_id` is a token that no answer holds; `more` is what else decides the answer, for the record.

    Raises: PortValueError, ConfigError, and what `complete` raises.
    """
    return drained(answers_in_pieces(inputs, model, lambda *chat: whole(partial(complete, *chat)), more=more))


def answers_in_pieces(
    inputs: Mapping[str, Any],
    model: str,
    complete: InPieces,
    *,
    more: Mapping[str, Any] | None = None,
    together: Together | None = None,
) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """As `answers`, where `complete` yields pieces (`{output port: piece}`) of its answer on the way.

    `together(chats, context items, schema, settings, seeds)` completes the chats of a batch at once, in pieces too.
    """
    settings = Settings.of(inputs.get("params"))
    chats, batch = conversations(inputs)
    schema = inputs.get("schema")
    if schema is not None:
        check_schema(schema)
    items = clean(context_items(inputs.get("context")))
    context = current_context()
    seed = settings.seed if settings.seed is not None else context.node_seed()
    usage = tally()
    texts: list[str] = []
    calls: list[list[dict[str, Any]]] = []
    ids: list[list[int]] = []
    pad = 0
    seeds = [derive_seed(seed, index) for index in range(len(chats))]
    made: list[dict[str, Any]] = []

    def of_batch(index: int) -> Generator[Any, Any, dict[str, Any]]:
        if not made and together is not None:
            made.extend((yield from together(chats, items, schema, settings, seeds)))
        return made[index]

    for index, (chat, own) in enumerate(zip(chats, seeds, strict=True)):
        one = partial(complete, chat, items, schema, settings, own)
        make = partial(of_batch, index) if together is not None and len(chats) > 1 else one
        record = asked(chat, items, schema, settings, own) | dict(more or {})
        got = yield from context.ask_in_pieces(model, record, make)
        usage = tally(usage, got["usage"])
        texts.append(got["answer"])
        calls.append(got.get("tool_calls", []))
        if "token_ids" in got:
            ids.append(got["token_ids"])
            pad = got["pad_id"]
    out: dict[str, Any] = {"text": texts if batch else texts[0], "usage": usage}
    if any(calls):
        out["tool_calls"] = calls if batch else calls[0]
    if ids and len(ids) == len(chats):
        out["token_ids"] = _padded(ids, pad)
    if schema is not None:
        data = [None if called else json.loads(text) for text, called in zip(texts, calls, strict=True)]
        if batch or not calls[0]:
            out["data"] = data if batch else data[0]
    return out


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Any:
    """Rows of token ids as one int64 tensor [B,L]."""
    import torch

    made = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=pad)


_SENTENCE_END = re.compile(r"[.!?]+[\"')\u201d\u2019]*(?=\s|$)")


def whole_sentences(text: str) -> str:
    """The text to the end of its last sentence; as it is where none ends."""
    return text[: sentences_end(text) or len(text)]


def sentences_end(text: str) -> int:
    """Where the last sentence of a text ends; 0 where none does."""
    return max((m.end() for m in _SENTENCE_END.finditer(text)), default=0)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def context_items(value: Any) -> list[dict[str, str]]:
    """Context in any accepted form as ranked `{text, source}` items."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [{"text": value, "source": ""}]
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), str):
            return [{"text": value["text"], "source": str(value.get("source", ""))}]
        found = [(str(k), item) for k, v in value.items() for item in context_items(v)]
        return [{"text": item["text"], "source": item["source"] or key} for key, item in found]
    if isinstance(value, Sequence):
        return [item for v in value for item in context_items(v)]
    return [{"text": json.dumps(value, ensure_ascii=False, default=str), "source": ""}]


def pack(items: Sequence[Mapping[str, str]], room: int, count: Callable[[str], int]) -> list[str]:
    """Lines of the items that fit into `room` tokens, best first; an item is taken whole or not at all."""
    lines: list[str] = []
    for item in items:
        line = f"- {' '.join(item['text'].split())}\n"
        size = count(line)
        if size <= room:
            lines.append(line)
            room -= size
    return lines


def with_context(chat: list[Message], lines: Sequence[str]) -> list[Message]:
    """The chat with context lines put before its last user message."""
    if not lines:
        return chat
    at = max((i for i, m in enumerate(chat) if m["role"] == "user"), default=len(chat) - 1)
    known = f"What is known:\n{''.join(lines)}\n{chat[at]['content']}"
    return [*chat[:at], {**chat[at], "content": known}, *chat[at + 1 :]]

"""A language model without a model: offline, quick, the same answer for the same seed and prompt."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from wg_blocks.json_schema import bounded, problems
from wg_blocks.prompt import (
    LLM_PORTS,
    Message,
    Settings,
    answers,
    pack,
    with_context,
)
from wg_core import Block, current_context
from wg_core.errors import ConfigError, MissingExtraError, OutputContractError

MODEL = "fake"

_WHO = "the ferryman|a lamp keeper|the old mason|a salt trader|the night watch|a young herald|the weaver|a bell ringer"
_DID = "mends|remembers|carries|finds|hides|counts|follows|forgets"
_WHAT = "the broken bell|a map of the shallows|the winter stores|an unlit lamp|the river gate|a letter without a name"
_WHERE = (
    "before the tide turns|below the north wall|while the market sleeps|in the long rain|at first light|near the pier"
)


def sentence(rng: random.Random) -> str:
    """One made-up sentence."""
    words = " ".join(rng.choice(part.split("|")) for part in (_WHO, _DID, _WHAT, _WHERE))
    return words[0].upper() + words[1:] + "."


class FakeLLM(Block):
    """Stands in for a language model: text from a small grammar, or a valid instance of the given JSON schema.

    `script` is a list of answers (texts, or JSON values) that are given in turn instead, from the first again after
    the last. Tokens are counted as words.

    Raises: ConfigError for unknown params, or a schema for which nothing valid was found; OutputContractError for a
    scripted answer that breaks the schema.
    """

    role = "llm"
    ports = LLM_PORTS

    def __init__(self, *, script: Sequence[Any] | None = None) -> None:
        super().__init__()
        self._writer = Writer(script)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return answers(inputs, MODEL, self._complete)

    def _complete(
        self, chat: list[Message], items: list[dict[str, str]], schema: Any, settings: Settings, seed: int
    ) -> dict[str, Any]:
        lines = pack(items, settings.context_tokens, _words)
        messages = with_context(chat, lines)
        key = hashlib.sha256(json.dumps([seed, messages]).encode()).digest()
        context = current_context()
        read = sum(_words(m["content"]) for m in messages)
        with context.hold(MODEL, tokens=read + settings.max_new_tokens) as held:
            text = self._answer(random.Random(key), schema, settings)
            counts = {"prompt_tokens": read, "completion_tokens": _words(text)}
            context.add_usage(MODEL, **counts, held=held)
        request = {"messages": messages, "schema": schema, "seed": seed}
        context.emit("model_call", model=MODEL, request=request, answer=text, seconds=0.0, **counts)
        packed = {"context_items": len(lines), "context_dropped": len(items) - len(lines)}
        return {"answer": text, "messages": messages, "usage": {"calls": 1, **counts, **packed}}

    def estimate_tokens(self, text: str) -> tuple[int, str]:
        """Tokens of a text, and how they were counted."""
        return _words(text), "words"

    def _answer(self, rng: random.Random, schema: Any, settings: Settings) -> str:
        text = self._writer.write(rng, schema, settings.max_new_tokens)
        if self._writer.script and schema is not None:
            try:
                value = json.loads(text)
            except ValueError as error:
                raise OutputContractError(f"llm/fake: a scripted answer is no JSON: {text[:200]}") from error
            if wrong := problems(schema, value):
                raise OutputContractError(f"llm/fake: a scripted answer breaks the schema: {'; '.join(wrong)}")
        return text


class Writer:
    """Answers without a model: those of a script in turn, else made up by `rng`, valid where there is a schema."""

    def __init__(self, script: Sequence[Any] | None = None) -> None:
        self.script = list(script or ())
        self._given = 0
        self._lock = threading.Lock()

    def write(self, rng: random.Random, schema: Any, max_words: int) -> str:
        if self.script:
            with self._lock:
                answer = self.script[self._given % len(self.script)]
                self._given += 1
            return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        if schema is None:
            words = " ".join(sentence(rng) for _ in range(rng.randint(2, 4))).split()
            return " ".join(words[:max_words])
        return json.dumps(invent(schema, rng), ensure_ascii=False)


def _words(text: str) -> int:
    return len(text.split())


def invent(schema: Mapping[str, Any], rng: random.Random) -> Any:
    """A valid instance of a JSON schema, chosen by `rng`.

    Raises: ConfigError when twenty tries gave none.
    """
    wrong: list[str] = []
    limits = bounded(schema)
    for _ in range(20):
        value = _Inventor(limits, rng).make(limits, 0)
        wrong = problems(schema, value)
        if not wrong:
            return value
    raise ConfigError(f"llm/fake: found no valid instance of this schema: {'; '.join(wrong)}")


class _Inventor:
    def __init__(self, root: Any, rng: random.Random) -> None:
        self.root = root
        self.rng = rng

    def make(self, node: Any, depth: int) -> Any:
        if not isinstance(node, Mapping):
            return self._string({"maxLength": 20})
        if "$ref" in node:
            if depth > 60:
                raise ConfigError("llm/fake: the schema's refs never end")
            target = self.root
            for part in node["$ref"].removeprefix("#").strip("/").split("/"):
                target = target[part.replace("~1", "/").replace("~0", "~")] if part else target
            return self.make({**target, **{k: v for k, v in node.items() if k != "$ref"}}, depth + 1)
        if "const" in node:
            return node["const"]
        if "enum" in node:
            return self.rng.choice(node["enum"])
        for key in ("oneOf", "anyOf"):
            if key in node:
                rest = {k: v for k, v in node.items() if k != key}
                choices = node[key][:1] if depth > 8 else node[key]
                return self.make(_merge(rest, self.rng.choice(choices)), depth + 1)
        if "allOf" in node:
            merged: dict[str, Any] = {k: v for k, v in node.items() if k != "allOf"}
            for part in node["allOf"]:
                merged = _merge(merged, part)
            return self.make(merged, depth + 1)
        return self._typed(node, depth)

    def _typed(self, node: Mapping[str, Any], depth: int) -> Any:
        kind = node.get("type") or ("object" if "properties" in node else "array" if "items" in node else "string")
        if isinstance(kind, list):
            kind = self.rng.choice(kind)
        if kind == "object":
            return self._object(node, depth)
        if kind == "array":
            return self._array(node, depth)
        if kind in ("integer", "number"):
            return self._number(node, whole=kind == "integer")
        if kind == "boolean":
            return self.rng.random() < 0.5
        return None if kind == "null" else self._string(node)

    def _object(self, node: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties, required = node.get("properties", {}), list(node.get("required", ()))
        others = [k for k in properties if k not in required]
        self.rng.shuffle(others)
        wanted = max(0, node.get("minProperties", 0) - len(required))
        chance = 0.5 if depth < 4 else 0.0
        taken = set(required) | set(others[:wanted]) | {k for k in others[wanted:] if self.rng.random() < chance}
        extra = node.get("additionalProperties")
        rest = extra if isinstance(extra, Mapping) else {}
        out = {k: self.make(v, depth + 1) for k, v in properties.items() if k in taken}
        out.update({k: self.make(rest, depth + 1) for k in required if k not in properties})
        while len(out) < node.get("minProperties", 0) and extra is not False:
            out[f"key_{len(out)}"] = self.make(rest, depth + 1)
        return out

    def _array(self, node: Mapping[str, Any], depth: int) -> list[Any]:
        first = [self.make(s, depth + 1) for s in node.get("prefixItems", ())]
        low, items = node.get("minItems", 0), node.get("items", {})
        if items is False:
            return first
        high = min(node.get("maxItems", low + 3), low + 3) if depth < 6 else low
        return first + [self.make(items, depth + 1) for _ in range(self.rng.randint(low, max(low, high)) - len(first))]

    def _number(self, node: Mapping[str, Any], *, whole: bool) -> float:
        low, high = (
            node.get("minimum", node.get("exclusiveMinimum", 0)),
            node.get("maximum", node.get("exclusiveMaximum", 100)),
        )
        step = node.get("multipleOf")
        if step:
            return self.rng.randint(-(-low // step).__trunc__(), (high // step).__trunc__()) * step
        if whole:
            first = -(-low // 1) + (1 if node.get("exclusiveMinimum") == low else 0)
            last = high // 1 - (1 if node.get("exclusiveMaximum") == high else 0)
            return self.rng.randint(int(first), int(last))
        return min(high, max(low, round(low + (high - low) * (0.02 + 0.96 * self.rng.random()), 6)))

    def _string(self, node: Mapping[str, Any]) -> str:
        low, high = node.get("minLength", 0), node.get("maxLength", 240)
        if "pattern" in node or "format" in node:
            return self._shaped(node, low, high)
        text = sentence(self.rng)
        while len(text) < low:
            text += " " + sentence(self.rng)
        if len(text) > high:
            cut = text[:high].rsplit(" ", 1)[0]
            text = cut if low <= len(cut) <= high and cut else text[:high]
        return text

    def _shaped(self, node: Mapping[str, Any], low: int, high: int) -> str:
        """A text of a pattern or format: a likely one if it fits, else a walk through the grammar byte by byte."""
        words = re.findall(r"[a-z]+", sentence(self.rng).lower())
        pattern = node.get("pattern")
        said = [sentence(self.rng) for _ in range(3)]
        if named := re.match(r"\^([A-Z][A-Za-z' -]*) \[a-z\]", pattern or ""):  # begins with a name
            said[0] = f"{named[1]} {' '.join(said[0].split()[3:])}"
        texts = (said[0], " ".join(said[:2]), " ".join(said))
        for guess in (words[1], "_".join(words[:2]), words[1].title(), " ".join(words[:2]).title(), *texts):
            if pattern and "format" not in node and low <= len(guess) <= high and re.search(pattern, guess):
                return guess
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise MissingExtraError("a pattern needs llguidance: pip install llguidance") from error
        schema = {
            "type": "string",
            **{k: node[k] for k in ("pattern", "format", "minLength", "maxLength") if k in node},
        }
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), None, {"whitespace_flexible": False})
        matcher = LLMatcher(LLTokenizer("byte"), grammar)
        out = bytearray()
        while not matcher.is_stopped() and len(out) < 2 * high + 64:
            allowed = [byte for byte, bias in enumerate(matcher.compute_logit_bias()[:127]) if bias]
            plain = [b for b in allowed if chr(b).isalnum() or chr(b) in " -_:."]
            done = 0x22 in allowed and len(out) > max(low, 12)
            byte = 0x22 if done or not plain else self.rng.choice(plain)
            if byte not in allowed:
                byte = self.rng.choice(allowed)
            out.append(byte)
            if not matcher.consume_token(byte):
                break
        if matcher.is_error():
            raise ConfigError(f"llm/fake: cannot make a text for this schema: {matcher.get_error()[:300]}")
        try:
            return json.loads(out)
        except ValueError as error:
            raise ConfigError(f"llm/fake: found no text of pattern {pattern!r}") from error


def _merge(left: Mapping[str, Any], right: Any) -> dict[str, Any]:
    """Both schemas at once, as far as keywords can be joined."""
    out = dict(left)
    for key, value in right.items() if isinstance(right, Mapping) else ():
        if key in ("properties", "$defs") and key in out:
            out[key] = {**out[key], **value}
        elif key == "required" and key in out:
            out[key] = [*out[key], *(k for k in value if k not in out[key])]
        elif key in ("minimum", "minLength", "minItems") and key in out:
            out[key] = max(out[key], value)
        elif key in ("maximum", "maxLength", "maxItems") and key in out:
            out[key] = min(out[key], value)
        else:
            out[key] = value
    return out

"""The provider `fake`: offline, the same answer for the same request, or what a script says."""

from __future__ import annotations

import colorsys
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wg_blocks.api.providers import Chat, Endpoint, Fault, Hear, Picture, Speak, Tell, Text, ToolCall
from wg_blocks.api.sound import to_wav
from wg_blocks.llm_fake import Writer
from wg_blocks.maps import to_png
from wg_core.errors import ApiRateLimitError, ApiResponseError, ApiTimeoutError, ConfigError, did_you_mean

_FAULTS: Mapping[str, Any] = {
    "timeout": lambda: Fault(ApiTimeoutError("provider fake: a scripted timeout")),
    "rate_limit": lambda: Fault(ApiRateLimitError("provider fake: a scripted rate limit"), again=True, wait=0.0),
    "quota": lambda: Fault(ApiRateLimitError("provider fake: a scripted end of the quota")),
    "server_error": lambda: Fault(ApiResponseError("provider fake: a scripted server error"), again=True, wait=0.0),
    "refusal": lambda: Fault(ApiResponseError("provider fake: the model refused, as scripted")),
}


class Fake:
    """Option `script`: answers to chats in turn, from the first again after the last; `{"fault": NAME}` fails, and
    `{"tool_calls": [{name, arguments}]}` calls tools where any are offered.

    Faults are timeout, rate_limit, quota, server_error and refusal. The position in a script is the endpoint's.
    """

    strict = False
    lengths = True
    wire: Mapping[str, str] = {
        n: n for n in ("temperature", "top_p", "top_k", "stop", "seed", "max_new_tokens", "repetition_penalty", "no_repeat_ngram")
    }  # fmt: skip

    def __init__(self, endpoint: Endpoint) -> None:
        options: dict[str, Any] = json.loads(endpoint.options)
        script = options.pop("script", [])
        if options or not isinstance(script, list):
            raise ConfigError(
                f"provider fake: its one option is script, a list of answers, not {sorted(options) or script!r}"
            )
        for entry in script:
            if isinstance(entry, Mapping) and "fault" in entry and entry["fault"] not in _FAULTS:
                raise ConfigError(
                    f"provider fake has no fault {entry['fault']!r}; {did_you_mean(str(entry['fault']), _FAULTS)}"
                )
        self._writer = Writer(script)

    async def chat(self, chat: Chat, tell: Tell | None = None) -> Text:
        messages = [dict(m) for m in chat.messages]
        rng = _random(chat.seed, chat.model, messages, [hashlib.sha256(i).hexdigest() for i in chat.images])
        schema = chat.form.get("schema") if chat.form is not None else None
        text = self._writer.write(rng, schema, chat.settings.get("max_new_tokens", 256))
        if self._writer.script and text.startswith('{"fault":'):
            raise _FAULTS[json.loads(text)["fault"]]()
        words = sum(len(m["content"].split()) for m in messages)
        if self._writer.script and chat.tools and chat.tool_choice != "none" and text.startswith('{"tool_calls":'):
            calls = json.loads(text)["tool_calls"]
            named = [ToolCall(f"call_{i}", c["name"], json.dumps(c["arguments"])) for i, c in enumerate(calls)]
            return Text("", True, words, len(text.split()), tuple(named))
        for piece in re.findall(r"\S+\s*", text) if tell is not None else ():
            await tell(piece)
        return Text(text, True, words, len(text.split()))

    async def embed(self, model: str, texts: Sequence[Any], settings: Mapping[str, Any]) -> tuple[list[Any], int]:
        """Unit vectors: texts that share words lie near each other."""
        size = int(settings.get("dimensions", 64))
        vectors: list[Any] = []
        words = [" ".join(map(str, t.values())) if isinstance(t, Mapping) else t for t in texts]
        for text in words:
            total = [1e-6] * size
            for word in text.lower().split():
                rng = _random(model, word)
                total = [t + rng.gauss(0, 1) for t in total]
            length = sum(t * t for t in total) ** 0.5
            vectors.append([t / length for t in total])
        return vectors, sum(len(t.split()) for t in words)

    async def picture(self, picture: Picture) -> tuple[bytes, int, int]:
        """A gradient between two colours of the prompt."""
        import numpy as np

        try:
            width, height = (int(n) for n in str(picture.settings.get("size", "64x64")).split("x"))
        except ValueError:
            raise Fault(ApiResponseError("provider fake: size is WIDTHxHEIGHT, such as 64x64")) from None
        given = hashlib.sha256(picture.image or b"").hexdigest()
        rng = _random(picture.seed, picture.model, picture.prompt, given)
        ends = [np.array(colorsys.hsv_to_rgb(rng.random(), 0.5, 0.4 + 0.5 * rng.random())) for _ in range(2)]
        slope = np.add.outer(np.linspace(0, 0.5, height), np.linspace(0, 0.5, width))[..., None]
        pixels = (255 * (ends[0] + (ends[1] - ends[0]) * slope)).astype(np.uint8)
        return to_png(np.ascontiguousarray(pixels)), len(picture.prompt.split()), 0

    async def speak(self, speak: Speak) -> bytes:
        """A tone for each word, its pitch the word's own."""
        import numpy as np

        rate, tones = 8000, list[Any]()
        for word in speak.text.lower().split():
            pitch = 110 * 2 ** (_random(speak.model, word).randrange(24) / 12)
            tones.append(np.sin(2 * np.pi * pitch * np.arange(rate // 8) / rate) * 0.3)
        return to_wav(np.concatenate(tones or [np.zeros(rate // 8)])[None].astype(np.float32), rate)

    async def hear(self, hear: Hear) -> Text:
        """A text that only the recording decides."""
        text = self._writer.write(_random(hear.model, hashlib.sha256(hear.wav).hexdigest()), None, 64)
        return Text(text, True, 0, len(text.split()))

    async def close(self) -> None:
        """Nothing is open."""


def _random(*parts: Any) -> random.Random:
    return random.Random(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest())

"""Speech from behind an API: text that is said."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from wg_blocks.api.base import ApiBlock, ApiConfig, Asking, estimate, sha
from wg_blocks.api.providers import Provider, Speak
from wg_blocks.api.sound import read_wav
from wg_core import current_context
from wg_core.assembly.roles import Speech
from wg_core.errors import ConfigError, did_you_mean
from wg_core.execution.context import drained

_PARAMS: Mapping[str, type | tuple[type, ...]] = {"voice": str, "instructions": str, "speed": (int, float)}


class SpeechConfig(ApiConfig):
    """`voice` is a name that the server knows."""

    voice: str = Field(default="alloy", min_length=1, max_length=128)
    max_response_bytes: int = Field(default=64 << 20, ge=1024, le=1 << 30)


class ApiSpeech(ApiBlock):
    """A text said: audio `{waveform float32 [channels, samples] in -1..1, sample_rate in Hz}`.

    `params` are voice, instructions and speed, as far as the server knows them.

    Raises: what `ApiBlock` raises, ConfigError for an unknown param; ApiResponseError for what is no whole sound.
    """

    role = "speech"
    config_model: ClassVar[type[ApiConfig]] = SpeechConfig
    ports = Speech.ports

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = {"voice": self.api.voice}
        for name, value in (inputs.get("params") or {}).items():
            if name not in _PARAMS or isinstance(value, bool) or not isinstance(value, _PARAMS[name]):
                raise ConfigError(
                    f"params.{name} is no setting of {self.name} or of another kind; {did_you_mean(str(name), _PARAMS)}"
                )
            settings[name] = value
        context = current_context()
        made: dict[str, bytes] = {}
        request = {"text": inputs["text"], "settings": settings}
        got = context.ask(self.model, request, partial(self._say, request, made))
        wav = made.get(got["answer"]) or context.blobs.get(got["answer"])
        return {"audio": read_wav(wav, self.name)}

    def _say(self, request: Mapping[str, Any], made: dict[str, bytes]) -> dict[str, Any]:
        asking = Asking[bytes](
            request=request,
            shown=request,
            prompt_tokens=estimate(request["text"]),
            completion_tokens=0,
            tokens=lambda answer: (0, 0),
            show=lambda answer: f"a sound of {len(answer)} bytes",
            to_json=lambda answer: base64.b64encode(answer).decode(),
            of_json=base64.b64decode,
            check=lambda answer: read_wav(answer, self.model),
        )
        speak = Speak(self.api.model_id, request["text"], {**request["settings"], **self.api.extra_body})
        wav, usage = drained(self.ask(asking, partial(_ask, speak)))
        name = sha(wav)
        made[name] = wav
        if (context := current_context()).frame is not None:
            context.blobs.put(wav)
        return {"answer": name, "usage": usage}


async def _ask(speak: Speak, provider: Provider) -> bytes:
    return await provider.speak(speak)

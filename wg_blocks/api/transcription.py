"""Transcription behind an API: what is said in a recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from wg_blocks.api.base import ApiBlock, ApiConfig, Asking, sha
from wg_blocks.api.providers import Hear, Provider, Text
from wg_blocks.api.sound import wav_of
from wg_blocks.prompt import clean
from wg_core import current_context
from wg_core.assembly.roles import Transcription
from wg_core.execution.context import drained


class TranscriptionConfig(ApiConfig):
    """`language` is an ISO 639-1 code; without it the server finds out."""

    language: str | None = Field(default=None, pattern=r"^[a-z]{2}$")


class ApiTranscription(ApiBlock):
    """The text of audio `{waveform [channels, samples] in -1..1, sample_rate in Hz}`; an empty one where nobody speaks.

    `prompt` tells the server words and names that may come.

    Raises: what `ApiBlock` raises, PortValueError for what is no sound.
    """

    role = "transcription"
    config_model: ClassVar[type[ApiConfig]] = TranscriptionConfig
    ports = Transcription.ports

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        wav = wav_of(inputs["audio"], f"{self.name}.audio")
        settings = {"language": self.api.language, "prompt": inputs.get("prompt")}
        request = {"audio": sha(wav), "settings": {k: v for k, v in settings.items() if v}}
        got = current_context().ask(self.model, request, partial(self._write, request, wav))
        return {"text": got["answer"]}

    def _write(self, request: Mapping[str, Any], wav: bytes) -> dict[str, Any]:
        asking = Asking[Text](
            request=request,
            shown=request,
            prompt_tokens=0,
            completion_tokens=0,
            tokens=lambda answer: (answer.prompt_tokens, answer.completion_tokens),
            show=lambda answer: clean(answer.text),
            to_json=asdict,
            of_json=lambda kept: Text(**{**kept, "tool_calls": ()}),
        )
        hear = Hear(self.api.model_id, wav, {**request["settings"], **self.api.extra_body})
        heard, usage = drained(self.ask(asking, partial(_ask, hear)))
        return {"answer": clean(heard.text).strip(), "usage": usage}


async def _ask(hear: Hear, provider: Provider) -> Text:
    return await provider.hear(hear)

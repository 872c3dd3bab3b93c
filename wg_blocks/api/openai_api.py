"""The provider `openai`: any server that speaks OpenAI's HTTP API, through the `openai` package."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from wg_blocks.api import openai_chat, openai_responses
from wg_blocks.api.http import HttpProvider, counted
from wg_blocks.api.providers import Chat, Endpoint, Hear, Picture, Speak, Tell, Text
from wg_core.errors import ConfigError, MissingExtraError

try:
    import openai
except ImportError as missing:
    raise MissingExtraError("provider openai needs the openai package: pip install 'openai>=3,<4'") from missing

WIRES: Mapping[str, ModuleType] = {"chat": openai_chat, "responses": openai_responses}


class OpenAI(HttpProvider):
    """Chat Completions or Responses, Embeddings, Images and Audio.

    Options: `wire` is `chat` (what compatible servers speak, and the one with seeds) or `responses`; `organization`
    and `project` are sent as headers, `query` with each URL, as Azure's api-version.
    """

    name = "openai"
    package = openai
    own_url = "https://api.openai.com/v1"
    own_key = "OPENAI_API_KEY"
    options = ("wire", "organization", "project", "query")

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.lengths = not self.own  # OpenAI's own service refuses them, decoders elsewhere keep them
        wire = self.chosen.get("wire", "chat")
        if wire not in WIRES:
            raise ConfigError(f"provider openai: option wire is {' or '.join(WIRES)}, not {wire!r}")
        self._chats: Any = WIRES[wire]
        self.wire: Mapping[str, str] = self._chats.settings(self.own)

    def make_sdk(self, **settings: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            admin_api_key="",
            organization="",
            project="",
            webhook_secret="",
            default_query=self.chosen.get("query"),
            **settings,
        )

    def headers(self, key: str | None) -> dict[str, str]:
        chosen = {f"openai-{n}": str(self.chosen[n]) for n in ("organization", "project") if self.chosen.get(n)}
        return chosen if key is None else {**chosen, "authorization": f"Bearer {key}"}

    # ---- tasks

    async def chat(self, chat: Chat, tell: Tell | None = None) -> Text:
        if tell is None:
            return self._chats.read(self, await self.post(self._chats.PATH, self._chats.body(chat)))
        return await self._chats.stream(self, chat, tell)

    async def embed(self, model: str, texts: Sequence[Any], settings: Mapping[str, Any]) -> tuple[list[Any], int]:
        body = {"model": model, "input": list(texts), "encoding_format": "float", **settings}
        answer = await self.post("/embeddings", body)
        rows = answer.get("data")
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            self.wrong("its answer has no data")
        by_index = {r.get("index", i): r.get("embedding") for i, r in enumerate(rows)}
        if sorted(by_index, key=str) != sorted(range(len(texts)), key=str):
            self.wrong(f"it gave {len(rows)} vectors for {len(texts)} texts")
        return [by_index[i] for i in range(len(texts))], counted(answer)[0]

    async def picture(self, picture: Picture) -> tuple[bytes, int, int]:
        body: dict[str, Any] = {"model": picture.model, "prompt": picture.prompt, "n": 1, **picture.settings}
        if not picture.model.startswith(("gpt-image", "chatgpt-image")):  # these always send bytes and refuse the word
            body["response_format"] = "b64_json"
        if picture.image is None:
            answer = await self.post("/images/generations", body)
        else:
            answer = await self.post(
                "/images/edits", body, files=[("image", ("image.png", picture.image, "image/png"))]
            )
        rows = answer.get("data")
        if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
            self.wrong("its answer has no data")
        coded = rows[0].get("b64_json")
        if not isinstance(coded, str) or not coded:
            self.wrong("it gave no picture (b64_json); a picture behind a URL is not fetched")
        try:
            return base64.b64decode(coded, validate=True), *counted(answer)
        except (binascii.Error, ValueError):
            self.wrong("its picture is no base64")

    async def speak(self, speak: Speak) -> bytes:
        body = {"model": speak.model, "input": speak.text, "response_format": "wav", **speak.settings}
        return (await self.send("/audio/speech", body)).content

    async def hear(self, hear: Hear) -> Text:
        body = {"model": hear.model, "response_format": "json", **hear.settings}
        files = [("file", ("sound.wav", hear.wav, "audio/wav"))]
        answer = await self.post("/audio/transcriptions", body, files=files)
        text = answer.get("text")
        if not isinstance(text, str):
            self.wrong(f"its answer has no text (text {type(text).__name__})")
        return Text(text, True, *counted(answer))

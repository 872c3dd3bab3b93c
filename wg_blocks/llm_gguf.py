"""A language model by llama.cpp (package `xllamacpp`, extra `llama_cpp`): a GGUF file, with the ports of any other."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wg_blocks.json_schema import bounded, problems
from wg_blocks.prompt import LLM_PORTS, Message, Settings, answers, pack, whole_sentences, with_context
from wg_blocks.store import ModelStore
from wg_core import Block, current_context
from wg_core.errors import ConfigError, MissingExtraError, MissingModelError, OutputContractError, PortValueError
from wg_core.execution.context import FRAME, check_stop, derive_seed

_SEEDS = 2**31
_CONTROL = (3, 4)  # kinds of tokens that are no text: control, user defined (GGUF, tokenizer.ggml.token_type)


class GGUF(Block):
    """A causal language model in a GGUF file, run by llama.cpp; `llm/hf` with `backend: llama_cpp`.

    `checkpoint_ref` is a name or ref of the model store, or a file. Weights load at the first call. llama.cpp decodes
    by itself: `no_repeat_ngram` is refused, and answers differ from those of `llm/hf`. Weights cannot be trained, and
    `token_ids` are never set: of a stream llama.cpp does not tell all tokens.

    Raises: MissingExtraError without the package, MissingModelError, ConfigError for an unknown setting,
    PortValueError for a prompt that is too long, OutputContractError when no attempt gave a whole structure.
    """

    role = "llm"
    ports = LLM_PORTS

    def __init__(self, *, checkpoint_ref: str, context_size: int = 4096) -> None:
        super().__init__()
        if isinstance(context_size, bool) or not isinstance(context_size, int) or context_size < 64:
            raise ConfigError(
                f"llm/hf, backend llama_cpp: context_size is a whole number from 64, not {context_size!r}"
            )
        self.checkpoint_ref = checkpoint_ref
        self.context_size = context_size
        self._server: Any = None
        self._marks = re.compile(r"(?!)")
        self._lock = threading.RLock()

    # ---- weights

    def file(self) -> Path:
        """The GGUF file. Raises: MissingModelError with the command that fetches it."""
        path = Path(self.checkpoint_ref)
        path = path if path.is_file() else ModelStore().path(self.checkpoint_ref)
        if path.suffix != ".gguf":
            raise MissingModelError(
                f"{self.checkpoint_ref} is no GGUF file but {path.name}; leave backend out to use it"
            )
        return path

    def weight_hash(self) -> str | None:
        """Sha256 of the file; None while it is not there."""
        try:
            path = self.file()
        except MissingModelError:
            return None
        store = ModelStore(path.parent) if Path(self.checkpoint_ref).is_file() else ModelStore()
        ref = f"file:{path.name}" if Path(self.checkpoint_ref).is_file() else self.checkpoint_ref
        return str(store.info(ref)["sha256"])

    def materialize(self) -> None:
        with self._lock:
            if self._server is None:
                server, self._marks = self._loaded(self.file()), _marks_of(self.file())
                self._server = server

    def _loaded(self, file: Path) -> Any:
        try:
            import xllamacpp
        except ImportError as error:
            raise MissingExtraError(
                "backend llama_cpp needs xllamacpp: pip install 'generative-worlds[llama_cpp]'"
            ) from error
        threads = os.environ.get("WG_TORCH_THREADS", "1")
        if not threads.isdigit() or threads == "0":
            raise ConfigError(f"WG_TORCH_THREADS is a whole number from 1, not {threads!r}")
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = self.context_size
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
        params.verbosity = -1
        params.hostnames = ["127.0.0.1"]
        return xllamacpp.Server(params)

    def close(self) -> None:
        with self._lock:
            self._server = None

    # ---- one call

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return answers(inputs, self.checkpoint_ref, self._complete)

    def estimate_tokens(self, text: str) -> tuple[int, str]:
        """Tokens of a text, and how they were counted: by words."""
        return -(-len(text.split()) * 4 // 3), "words"

    def _complete(
        self, chat: Sequence[Message], items: Sequence[Mapping[str, str]], schema: Any, settings: Settings, seed: int
    ) -> dict[str, Any]:
        if settings.no_repeat_ngram:
            raise ConfigError("params.no_repeat_ngram: llama.cpp does not know it; leave it out or set it to 0")
        self.materialize()
        context = current_context()
        lines = pack(items, settings.context_tokens, lambda text: self.estimate_tokens(text)[0])
        chat = [{**m, "content": self._marks.sub(" ", m["content"])} for m in with_context(list(chat), lines)]
        usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        usage |= {"context_items": len(lines), "context_dropped": len(items) - len(lines)}
        text, wrong = "", ["no attempt was made"]
        for attempt in range(1 + (settings.max_repairs if schema is not None else 0)):
            room = settings.max_new_tokens * (2 + attempt) // 2
            started = time.perf_counter()
            with context.hold(self.checkpoint_ref, tokens=self.context_size) as held:
                text, ended, counts, cached = self._ask(chat, schema, settings, room, derive_seed(seed, attempt))
                context.add_usage(self.checkpoint_ref, cached_tokens=cached, held=held, **counts)
            usage |= {name: usage[name] + number for name, number in {"calls": 1, **counts}.items()}
            request = {"messages": [dict(m) for m in chat], "schema": schema, "seed": seed}
            more = {"answer": text, "seconds": time.perf_counter() - started, "cached_tokens": cached, **counts}
            context.emit("model_call", model=self.checkpoint_ref, request=request, **more)
            if schema is None:
                text = text.strip()
                text = whole_sentences(text) if settings.whole_sentences and not ended else text
                return {"answer": text, "messages": [dict(m) for m in chat], "usage": usage}
            value, wrong = _read(text, ended, schema)
            if not wrong:
                return {
                    "answer": json.dumps(value, ensure_ascii=False),
                    "messages": [dict(m) for m in chat],
                    "usage": usage,
                }
        raise OutputContractError(
            f"{self.checkpoint_ref} gave no valid structure in {1 + settings.max_repairs} attempts: {'; '.join(wrong)}; "
            f"raise params.max_new_tokens ({settings.max_new_tokens}) or bound the schema more. It wrote: {text[:2000]}"
        )

    def _ask(
        self, chat: Sequence[Message], schema: Any, settings: Settings, room: int, seed: int
    ) -> tuple[str, bool, dict[str, int], int]:
        """(text, whether it ended by itself, tokens, those of the prompt that were known)."""
        request: dict[str, Any] = {
            "messages": list(chat),
            "max_tokens": room,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": 0.0,
            "repeat_penalty": settings.repetition_penalty,
            "seed": seed % _SEEDS,
            "stop": list(settings.stop),
        }
        if schema is not None:
            request["response_format"] = {"type": "json_schema", "json_schema": {"schema": bounded(schema)}}
        request |= {"stream": True, "stream_options": {"include_usage": True}}
        answer, frame = _Answer(), FRAME.get()

        def take(chunk: Mapping[str, Any]) -> bool:
            """Keep a piece; True ends the answer. An exception would be swallowed here, so it is kept for later."""
            try:
                if frame is not None:
                    check_stop(frame)
                answer.take(chunk)
            except BaseException as error:
                answer.failed = error
            return answer.failed is not None

        with self._lock:
            refused = self._server.handle_chat_completions(request, take)
        if answer.failed is not None:
            raise answer.failed
        said = str(answer.error or refused or "it gave no answer")
        if answer.finish is None:
            if "context" in said or "exceed" in said:
                raise PortValueError(
                    f"{self.checkpoint_ref}: {said[:300]}; it holds {self.context_size} (context_size)"
                )
            raise ConfigError(f"{self.checkpoint_ref}: llama.cpp refused the request: {said[:400]}")
        used = answer.usage
        counts = {name: int(used[name]) for name in ("prompt_tokens", "completion_tokens")}
        cached = int((used.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
        return answer.text, answer.finish == "stop", counts, cached


@dataclass(slots=True)
class _Answer:
    """A stream of chunks of a chat completion, put together."""

    text: str = ""
    finish: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: Any = None
    failed: BaseException | None = None

    def take(self, chunk: Mapping[str, Any]) -> None:
        self.error = chunk.get("error", self.error)
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
            self.finish = choice["finish_reason"] or self.finish


def _marks_of(file: Path) -> re.Pattern[str]:
    """What matches the control tokens of a model in a text, so that no text can end its turn."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    found = zip(tokens.contents(), kinds.contents(), strict=True) if tokens and kinds else ()
    marks = sorted((str(token) for token, kind in found if kind in _CONTROL), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks)) or r"(?!)")


def _read(text: str, ended: bool, schema: Mapping[str, Any]) -> tuple[Any, list[str]]:
    if not ended:
        return None, ["it broke off at the limit of tokens"]
    try:
        value = json.loads(text)
    except ValueError as error:
        return None, [f"no JSON: {error}"]
    return value, problems(schema, value)

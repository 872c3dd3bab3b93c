"""A language model on this machine: transformers weights, sampling by seed, answers that obey a JSON schema."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wg_blocks.decoding import EMIT_EVERY, PrefixCache, Vocabulary, Writer, agreeing, decode, decode_batch
from wg_blocks.json_schema import bounded, problems
from wg_blocks.prompt import LLM_PORTS, Message, Settings, answers_in_pieces, pack, with_context
from wg_blocks.published import Published
from wg_core import current_context
from wg_core.errors import (
    AdapterError,
    ConfigError,
    MissingExtraError,
    MissingModelError,
    OutputContractError,
    PortValueError,
)
from wg_core.execution.context import derive_seed, drained
from wg_core.weights.lora import per_row, working_on

if TYPE_CHECKING:
    from torch import Tensor, nn

DTYPES = ("float32", "bfloat16", "float16", "float64")  # the last where rounding must decide nothing
BITS = {"int8": 8, "int4": 4}
FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a model is beside its weights; a checkpoint keeps these files, so that it needs no other source."""


def load(folder: Path, dtype: str = "float32", *, weights: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder with config, tokenizer and safetensors weights; runs no code from the folder.

    Without `weights` the model is built from its config and has random ones. Sets the process's torch threads to
    WG_TORCH_THREADS (default 1): more are slower as soon as cores are shared.
    """
    try:
        import torch  # noqa: F401
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError("llm/hf needs torch and transformers: pip install torch transformers") from error
    set_threads()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if weights:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe)
        else:
            config = AutoConfig.from_pretrained(folder, **safe)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = load_tokenizer(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def set_threads() -> None:
    """Set the process's torch threads to WG_TORCH_THREADS, by default 1. Raises: ConfigError."""
    import torch

    threads = os.environ.get("WG_TORCH_THREADS", "1")
    if not threads.isdigit() or threads == "0":
        raise ConfigError(f"WG_TORCH_THREADS is a whole number from 1, not {threads!r}")
    torch.set_num_threads(int(threads))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; runs no code from the folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read_files(folder: Path) -> dict[str, Tensor]:
    """The `FILES` of a folder as bytes."""
    import torch

    data = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return {name: torch.frombuffer(bytearray(read), dtype=torch.uint8) for name, read in data.items() if read}


def _files_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: state[f"files.{name}"] for name in FILES if f"files.{name}" in state}


@dataclass(slots=True)
class _Asked:
    """One chat on its way to an answer: what is asked, with which seed, and what came of it."""

    chat: list[Message]
    prompt: list[int]
    shared: int
    seed: int
    usage: dict[str, int]
    wrong: list[str] = field(default_factory=list[str])
    text: str = ""
    ids: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class _Wanted:
    """Answers that one call of a batch wants written: with which adapters, and the key of what is kept of prompts."""

    writers: Sequence[Writer]
    key: Any
    adapters: tuple[Any, ...]
    tell: Callable[[Writer], None]


class CausalLM(Published):
    """A local causal language model: `modules["lm"]`, and the tokenizer that belongs to it.

    `checkpoint_ref` is a name of the model store, a ref (`hf:`, `file:`, ...) or a folder; weights load at the first
    call (or `materialize()`). How to sample is part of the call, in `params` (see `Settings`), so that all users of
    one model share it. `weights: int8` or `int4` holds those of a Llama as whole numbers (see `PackedLlama`): smaller,
    several times as fast on a CPU, and not to be trained or adapted. With a `schema` the answer is decoded under it and
    comes parsed as `data`. Where they are read, `token_ids` [B,L] (a single prompt is a batch of one) are the tokens that
    were written: their text is `text` before it was stripped, cut at a `stop` text or to whole sentences. They do without
    the end token, which shorter rows are padded with. A checkpoint holds weights, config and tokenizer; a block that is loaded from it needs no
    `checkpoint_ref` any more.

    Raises: ConfigError for an unknown setting or schema keyword, PortValueError for a prompt that is too long,
    OutputContractError when no attempt gave a whole structure, MissingModelError.
    """

    role = "llm"
    ports = LLM_PORTS

    def __init__(self, *, checkpoint_ref: str, dtype: str = "float32", weights: str | None = None) -> None:
        super().__init__()
        if weights is not None and weights not in BITS:
            raise ConfigError(f"llm/hf: weights is 'int8', 'int4' or left out, not {weights!r}")
        if weights is not None and dtype != "float32":
            raise ConfigError(f"llm/hf: weights {weights!r} go with dtype float32, not {dtype}")
        if dtype not in DTYPES:
            raise ConfigError(f"llm/hf: dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        self.checkpoint_ref = checkpoint_ref
        self.dtype = dtype
        self.weights = weights
        self._prefixes = PrefixCache()
        self._files: dict[str, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        self._tokenizer: Any = None
        self._vocabulary: Vocabulary | None = None
        self._guide: Any = None
        self._counter: Any = None

    # ---- weights

    def build_modules(self) -> Mapping[str, nn.Module]:
        with self._source() as folder:
            model, self._tokenizer = load(folder, self.dtype, weights=self._read_weights)
            self._files = _read_files(folder)
        if self.weights is None:
            return {"lm": model}
        from wg_blocks.packed import PackedLlama

        return {"lm": PackedLlama(model, BITS[self.weights])}

    @contextmanager
    def _source(self) -> Iterator[Path]:
        """The folder with the model's files: where it was published, or what a checkpoint holds of them."""
        if self._read_weights or not self._files:
            yield self.folder()
            return
        with tempfile.TemporaryDirectory(prefix="wg-lm-") as temp:
            for name, data in self._files.items():
                (Path(temp) / name).write_bytes(data.numpy().tobytes())
            yield Path(temp)

    @property
    def module(self) -> Any:
        """The model, loaded if need be."""
        return self.modules["lm"]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded if need be; loads no weights."""
        if self._tokenizer is None:
            with self._lock:
                if self._tokenizer is None:
                    with self._source() as folder:
                        self._tokenizer = load_tokenizer(folder)
        return self._tokenizer

    def unload(self) -> None:
        with self._lock:
            super().unload()
            self._files = {}
            self._prefixes.clear()
            self._forget()

    # ---- state

    def expect_state(self, state: Mapping[str, Any]) -> None:
        self._files = _files_of(state)

    def own_state_dict(self) -> dict[str, Any]:
        state = super().own_state_dict()
        return state | {f"files.{name}": data for name, data in self._files.items()}

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_own_state_dict(state)
        given = _files_of(state)
        if any(not data.equal(self._files[name]) for name, data in given.items()):
            with self._lock:
                self._files, self._read_weights = self._files | given, False
                self._forget()
                with self._source() as folder:
                    self._tokenizer = load_tokenizer(folder)

    # ---- one call

    def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Pieces of the text come for one prompt without a schema; several prompts are decoded as one batch."""
        return answers_in_pieces(inputs, self.checkpoint_ref, self._complete, together=self._completed)

    def batch_forward(self, inputs: dict[str, Any]) -> Generator[Any, Any, dict[str, Any]]:
        """Answers of several calls are decoded as one batch, each with the adapters and the seed of its call."""
        one, several = (partial(how, joined=True) for how in (self._complete, self._completed))
        return answers_in_pieces(inputs, self.checkpoint_ref, one, together=several)

    def answer_batch(self, requests: Sequence[_Wanted]) -> list[list[int] | Exception]:
        """For each request how much of its prompts was known already, or what stopped its run alone."""
        prefixes = None if self.training else self._prefixes
        rows = [(writer, r) for r in requests for writer in r.writers]
        owners = {id(writer): r for writer, r in rows}
        stopped: dict[int, Exception] = {}

        def tell(writer: Writer) -> None:
            try:
                owners[id(writer)].tell(writer)
            except Exception as error:  # of this run; the others are written to their ends
                stopped[id(owners[id(writer)])] = error
                writer.ended = True

        known: list[int] | None = None
        if len(rows) > 1 and self.weights is None:
            writers, keys, adapters = zip(*((writer, r.key, r.adapters) for writer, r in rows), strict=True)
            known = decode_batch(self.module, writers, prefixes, keys, tell, adapters)
        if known is None:
            known = []
            for writer, r in rows:
                with per_row([r.adapters]):
                    known.append(drained(decode(self.module, writer, prefixes, r.key, tell)))
        each = iter(known)
        answers = [list(islice(each, len(r.writers))) for r in requests]
        return [stopped.get(id(r), answer) for r, answer in zip(requests, answers, strict=True)]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, counted by this model's own tokenizer; loads no weights."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def estimate_tokens(self, text: str) -> tuple[int, str]:
        """Tokens of a text, and how they were counted: by the model's tokenizer where it is in the store, else by words.

        Loads no weights.
        """
        try:
            from tokenizers import Tokenizer

            file = self.folder() / "tokenizer.json"
            if self._counter is None and file.is_file():
                self._counter = Tokenizer.from_file(str(file))
        except (MissingModelError, ImportError):
            pass
        if self._counter is None:
            return -(-len(text.split()) * 4 // 3), "words"
        return len(self._counter.encode(text, add_special_tokens=False).ids), "tokenizer"

    def _complete(
        self,
        chat: Sequence[Message],
        items: Sequence[Mapping[str, str]],
        schema: Any,
        settings: Settings,
        seed: int,
        joined: bool = False,
    ) -> Generator[dict[str, Any], Any, dict[str, Any]]:
        (answer,) = yield from self._completed([chat], items, schema, settings, [seed], joined)
        return answer

    def _completed(
        self,
        chats: Sequence[Sequence[Message]],
        items: Sequence[Mapping[str, str]],
        schema: Any,
        settings: Settings,
        seeds: Sequence[int],
        joined: bool = False,
    ) -> Generator[Any, Any, list[dict[str, Any]]]:
        """The answers to chats; a structure that breaks off is written again with more room."""
        lines = pack(items, settings.context_tokens, self.count_tokens)
        asked = [self._asked(with_context(list(c), lines), settings, s) for c, s in zip(chats, seeds, strict=True)]
        left, limit = asked, self._context_size()
        for attempt in range(1 + (settings.max_repairs if schema is not None else 0)):
            writers: list[Writer] = []
            for one in left:
                more = min(settings.max_new_tokens * (2 + attempt) // 2, limit - len(one.prompt))
                room, seed = replace(settings, max_new_tokens=more), derive_seed(one.seed, attempt)
                writers.append(self._writer(one.prompt, room, seed, schema, one.shared))
            started = time.perf_counter()
            with ExitStack() as budget:
                held = [budget.enter_context(self._budgeted(writer)) for writer in writers]
                known = yield from self._write(writers, pieces=len(chats) == 1 and schema is None, joined=joined)
                seconds = (time.perf_counter() - started) / len(left)
                for one, writer, cached, hold in zip(left, writers, known, held, strict=True):
                    self._note(one, writer, cached, seconds, schema, hold)
            left = [one for one in left if one.wrong]
            if not left:
                context = {"context_items": len(lines), "context_dropped": len(items) - len(lines)}
                wants_ids = current_context().reads("token_ids")
                return [
                    {"answer": one.text, "messages": [dict(m) for m in one.chat], "usage": one.usage | context}
                    | ({"token_ids": one.ids, "pad_id": self._end_id()} if wants_ids else {})
                    for one in asked
                ]
        raise OutputContractError(
            f"{self.checkpoint_ref} gave no valid structure in {1 + settings.max_repairs} attempts: "
            f"{'; '.join(left[0].wrong)}; raise params.max_new_tokens ({settings.max_new_tokens}) or bound the schema "
            f"more. It wrote: {left[0].text[:2000]}"
        )

    def _asked(self, chat: list[Message], settings: Settings, seed: int) -> _Asked:
        prompt, limit = self._prompt_ids(chat), self._context_size()
        if len(prompt) + settings.max_new_tokens > limit:
            raise PortValueError(
                f"the prompt has {len(prompt)} tokens and asks for {settings.max_new_tokens} more, but "
                f"{self.checkpoint_ref} holds {limit}; lower params.context_tokens or params.max_new_tokens"
            )
        usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        return _Asked(chat, prompt, self._shared(chat, prompt), seed, usage)

    def _budgeted(self, writer: Writer) -> Any:
        tokens = len(writer.prompt) + writer.settings.max_new_tokens
        return current_context().hold(self.checkpoint_ref, tokens=tokens)

    def _note(self, one: _Asked, writer: Writer, cached: int, seconds: float, schema: Any, hold: Any) -> None:
        """Count one answer, tell of it, and see what is wrong with it."""
        counts = {"prompt_tokens": len(one.prompt), "completion_tokens": len(writer.ids)}
        one.usage["calls"] += 1
        for key, number in counts.items():
            one.usage[key] += number
        context = current_context()
        context.add_usage(self.checkpoint_ref, cached_tokens=cached, held=hold, **counts)
        settings = _plain(writer.settings)
        request = {"messages": [dict(m) for m in one.chat], "schema": schema, "settings": settings, "seed": one.seed}
        more = {"answer": writer.text, "seconds": seconds, "cached_tokens": cached, **counts}
        context.emit("model_call", model=self.checkpoint_ref, request=request, **more)
        one.text, one.ids = writer.text, writer.ids
        one.wrong = self._wrong(writer, schema) if schema is not None else []

    @staticmethod
    def _wrong(answer: Writer, schema: Mapping[str, Any]) -> list[str]:
        if not answer.ended:
            return [f"it broke off after {len(answer.ids)} tokens"]
        try:
            value = json.loads(answer.text)
        except ValueError as error:
            return [f"no JSON: {error}"]
        return problems(schema, value)

    def _prompt_ids(self, chat: Sequence[Message]) -> list[int]:
        """Tokens of a chat; the model's control tokens are taken out of the texts, so that no text can end its turn."""
        marks = self._marks()
        chat = [{**m, "content": marks.sub(" ", m["content"])} for m in chat]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(self.tokenizer("\n\n".join(m["content"] for m in chat) + "\n").input_ids)

    def _shared(self, chat: Sequence[Message], prompt: Sequence[int]) -> int:
        """How many tokens stand before the first text that is not the system's; 0 where that cannot be told."""
        system = [*takewhile(lambda m: m["role"] == "system", chat)]
        one, other = (self._prompt_ids([*system, {"role": "user", "content": text}]) for text in "ab")
        size = agreeing(one, other)
        return size if size < len(one) and size == agreeing(one[:size], prompt) else 0

    def _marks(self) -> re.Pattern[str]:
        """What matches the model's control tokens in a text."""
        marks = {*self.tokenizer.all_special_tokens, *(str(t) for t in self.tokenizer.added_tokens_decoder.values())}
        return re.compile("|".join(re.escape(m) for m in sorted(marks, key=len, reverse=True)) or r"(?!)")

    def _context_size(self) -> int:
        return getattr(self.module.config, "max_position_embeddings", None) or 1 << 30

    # ---- learning

    def answer_loss(self, examples: Sequence[Mapping[str, Any]]) -> tuple[Tensor, int]:
        """Mean cross-entropy of answers under this model, in nats per token, and the number of answer tokens.

        An example is `{"messages": [{role, content}, ...], "answer": text}`. Its tokens are those of a call with these
        messages, then the answer's and the end token; only the last two count. The scalar has a gradient where weights
        or adapters learn.

        Raises: PortValueError for no examples, or one that is longer than the model's context.
        """
        import torch

        self._learns()
        if not examples:
            raise PortValueError(f"{self.checkpoint_ref}: answer_loss needs at least one example")
        model, limit = self.module, self._context_size()
        rows = [(self._prompt_ids(e["messages"]), self._answer_ids(e["answer"])) for e in examples]
        size = max(len(prompt) + len(answer) for prompt, answer in rows)
        if size > limit:
            raise PortValueError(f"an example has {size} tokens, but {self.checkpoint_ref} holds {limit}; shorten it")
        ids, mask, targets = (torch.full((len(rows), size), fill) for fill in (0, 0, -100))
        for row, (prompt, answer) in enumerate(rows):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor(prompt + answer)
            mask[row, :length] = 1
            targets[row, len(prompt) : length] = torch.tensor(answer)
        first = min(len(prompt) for prompt, _ in rows)
        device = next(model.parameters()).device
        kept = torch.arange(first - 1, size - 1, device=device)  # the positions that any answer is predicted from
        out = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=kept)
        loss = torch.nn.functional.cross_entropy(
            out.logits.float().flatten(0, 1), targets[:, first:].to(device).flatten(), ignore_index=-100
        )
        return loss, sum(len(answer) for _, answer in rows)

    def _learns(self) -> None:
        if self.weights is not None:
            raise AdapterError(
                f"{self.name}: {self.checkpoint_ref} with weights {self.weights!r} can neither be trained nor adapted; "
                "leave weights out of its config"
            )

    @property
    def fixed(self) -> str:
        """Why a LoRA world passes this model over; empty where it can be adapted."""
        return f"its weights are {self.weights}, which are neither trained nor adapted" if self.weights is not None else ""

    def adapter_slots(self) -> list[str]:
        return [] if self.weights is not None else super().adapter_slots()

    def slot_modules(self) -> dict[str, nn.Module]:
        self._learns()
        return super().slot_modules()

    def _move(self, device: Any, dtype: Any) -> None:
        if self.weights is not None and (str(device or "cpu") != "cpu" or dtype not in (None, "float32")):
            raise ConfigError(f"{self.name}: weights {self.weights!r} stay on the CPU, with dtype float32")
        super()._move(device, dtype)

    def _answer_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(self._marks().sub(" ", text), add_special_tokens=False).input_ids)
        return [*ids, self._end_id()]

    # ---- decoding

    def _writer(self, prompt: Sequence[int], settings: Settings, seed: int, schema: Any, shared: int = 0) -> Writer:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer, self._end_ids())
        guide = self._matcher(schema) if schema is not None else None
        return Writer(prompt, settings, seed, self._vocabulary, guide, self.checkpoint_ref, shared)

    def _write(self, writers: Sequence[Writer], *, pieces: bool, joined: bool = False) -> Generator[Any, Any, list[int]]:
        """Write answers to their ends, several as a batch; gives for each how much of its prompt was known already.

        With `joined` it is left to others: a request for all of them is yielded.
        """
        context = current_context()
        adapters = working_on(self)
        at_work = ((a, *(a._built or {}).values(), a._versions()) for a in adapters)
        key = (self.model_revision, self._versions(), *at_work)

        def tell(writer: Writer) -> None:
            text = writer.vocabulary.text(writer.ids[-EMIT_EVERY:])
            context.emit("progress", done=len(writer.ids), total=writer.settings.max_new_tokens, text=text)

        wanted = _Wanted(writers, key, adapters, tell)
        if joined:
            return (yield wanted)
        if len(writers) > 1:
            (known,) = self.answer_batch([wanted])
            if isinstance(known, Exception):
                raise known
            return known
        written = decode(self.module, writers[0], None if self.training else self._prefixes, key, tell)
        try:
            while True:
                piece = next(written)
                if pieces:
                    yield {"text": piece}
        except StopIteration as stop:
            return [stop.value]

    def _end_ids(self) -> set[int]:
        known = self.module.generation_config.eos_token_id
        ends = {known} if isinstance(known, int) else set(known or ())
        return ends | ({self.tokenizer.eos_token_id} if self.tokenizer.eos_token_id is not None else set())

    def _end_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return min(self._end_ids()) if end is None else end

    def _matcher(self, schema: Mapping[str, Any]) -> Any:
        """A fresh llguidance matcher for a schema. Raises: ConfigError when it cannot be decoded under."""
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise MissingExtraError("a schema needs llguidance: pip install llguidance") from error
        if self._guide is None:
            size, ends = self.module.config.vocab_size, sorted(self._end_ids())
            self._guide = LLTokenizer(_for_guide(self.tokenizer), n_vocab=size, eos_token=ends)
        form: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(bounded(schema)), None, form)
        matcher = LLMatcher(self._guide, grammar)
        if matcher.is_error():
            raise ConfigError(f"cannot decode under this JSON schema: {matcher.get_error()[:400]}")
        return matcher


def _for_guide(tokenizer: Any) -> str:
    """A tokenizer as llguidance takes it, its control tokens under other names.

    So what a schema makes the model write is text, also where it reads like a control token.
    """
    form: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    model, added = form["model"], form["added_tokens"]
    names = {t["content"]: f"\uf8ff{t['content']}" for t in added if t["special"] and t["content"] != model.get("unk_token")}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    return json.dumps(form)


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in Settings.__dataclass_fields__ if name != "seed"}

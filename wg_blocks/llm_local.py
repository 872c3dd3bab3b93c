"""A language model on this machine: transformers weights, sampling by seed, answers that obey a JSON schema."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wg_blocks.json_schema import bounded, problems
from wg_blocks.prompt import (
    LLM_PORTS,
    Message,
    Settings,
    answers,
    pack,
    whole_sentences,
    with_context,
)
from wg_blocks.store import ModelStore
from wg_core import current_context
from wg_core.errors import ConfigError, MissingExtraError, MissingModelError, OutputContractError, PortValueError
from wg_core.execution.context import derive_seed
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from torch import Tensor, nn

DTYPES = ("float32", "bfloat16", "float16")
PENALTY_WINDOW = 256
EMIT_EVERY = 8
COPY_COST = 100.0  # below any other token, yet possible where a schema leaves no choice
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
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError("llm/hf needs torch and transformers: pip install torch transformers") from error
    threads = os.environ.get("WG_TORCH_THREADS", "1")
    if not threads.isdigit() or threads == "0":
        raise ConfigError(f"WG_TORCH_THREADS is a whole number from 1, not {threads!r}")
    torch.set_num_threads(int(threads))
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
class _Answer:
    """Tokens of one answer, and whether it ended by itself (end token, stop text, complete structure)."""

    ids: list[int]
    ended: bool
    text: str = ""


class _Copies:
    """Which token would now repeat `size` tokens in a row of the prompt or the answer."""

    def __init__(self, prompt: Sequence[int], size: int) -> None:
        self.size = size
        self.next: dict[tuple[int, ...], set[int]] = {}
        self.seen: list[int] = []
        self.add(prompt)

    def add(self, ids: Sequence[int]) -> None:
        for token in ids:
            if len(self.seen) >= self.size - 1:
                self.next.setdefault(self._tail(), set()).add(token)
            self.seen.append(token)

    def now(self) -> list[int]:
        return sorted(self.next.get(self._tail(), ()))

    def _tail(self) -> tuple[int, ...]:
        return tuple(self.seen[len(self.seen) - self.size + 1 :])


class CausalLM(ModuleBlock):
    """A local causal language model: `modules["lm"]`, and the tokenizer that belongs to it.

    `checkpoint_ref` is a name of the model store, a ref (`hf:`, `file:`, ...) or a folder; weights load at the first
    call (or `materialize()`). How to sample is part of the call, in `params` (see `Settings`), so that all users of
    one model share it. With a `schema` the answer is decoded under it and comes parsed as `data`. A checkpoint holds
    weights, config and tokenizer; a block that is loaded from it needs no `checkpoint_ref` any more.

    Raises: ConfigError for an unknown setting or schema keyword, PortValueError for a prompt that is too long,
    OutputContractError when no attempt gave a whole structure, MissingModelError.
    """

    role = "llm"
    ports = LLM_PORTS

    def __init__(self, *, checkpoint_ref: str, dtype: str = "float32") -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"llm/hf: dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        self.checkpoint_ref = checkpoint_ref
        self.dtype = dtype
        self._read_weights = True
        self._files: dict[str, Tensor] = {}
        self._sha256: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._tokenizer: Any = None
        self._words: Any = None
        self._guide: Any = None
        self._counter: Any = None

    # ---- weights

    def folder(self) -> Path:
        """Where the weights lie. Raises: MissingModelError with the command that fetches them."""
        path = Path(self.checkpoint_ref)
        return path if path.is_dir() else ModelStore().path(self.checkpoint_ref)

    def weight_hash(self) -> str | None:
        """Sha256 of the weight file as it was published, or of the weights as they are once they were changed.

        None while the model is not there.
        """
        if self.weights_changed():
            return super().weight_hash()
        if self._sha256 is None:
            path = Path(self.checkpoint_ref)
            store, ref = (ModelStore(path.parent), f"file:{path.name}") if path.is_dir() else (ModelStore(), None)
            try:
                self._sha256 = str(store.info(ref or self.checkpoint_ref)["sha256"])
            except MissingModelError:
                return None
        return self._sha256

    def build(self, *, read_reference: bool = True) -> None:
        with self._lock:
            self._read_weights = read_reference
            super().build(read_reference=False)  # a model is read as it is made

    def build_modules(self) -> Mapping[str, nn.Module]:
        with self._source() as folder:
            model, self._tokenizer = load(folder, self.dtype, weights=self._read_weights)
            self._files = _read_files(folder)
        return {"lm": model}

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
        """The tokenizer, loaded with the model if need be."""
        self.materialize()
        return self._tokenizer

    def unload(self) -> None:
        with self._lock:
            super().unload()
            self._files = {}
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

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return answers(inputs, self.checkpoint_ref, self._complete)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, counted by this model's own tokenizer."""
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
    ) -> dict[str, Any]:
        """The answer to one chat; a structure that breaks off is written again with more room."""
        lines = pack(items, settings.context_tokens, self.count_tokens)
        chat = with_context(list(chat), lines)
        usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
        usage |= {"context_items": len(lines), "context_dropped": len(items) - len(lines)}
        context, prompt = current_context(), self._prompt_ids(chat)
        answer, wrong = _Answer([], False), ["no attempt was made"]
        limit = self._context_size()
        if len(prompt) + settings.max_new_tokens > limit:
            raise PortValueError(
                f"the prompt has {len(prompt)} tokens and asks for {settings.max_new_tokens} more, but "
                f"{self.checkpoint_ref} holds {limit}; lower params.context_tokens or params.max_new_tokens"
            )
        for attempt in range(1 + (settings.max_repairs if schema is not None else 0)):
            more = min(settings.max_new_tokens * (2 + attempt) // 2, limit - len(prompt))
            room = replace(settings, max_new_tokens=more)
            started = time.perf_counter()
            with context.hold(self.checkpoint_ref, tokens=len(prompt) + more) as held:
                answer = self._decode(prompt, room, derive_seed(seed, attempt), schema)
                counts = {"prompt_tokens": len(prompt), "completion_tokens": len(answer.ids)}
                context.add_usage(self.checkpoint_ref, **counts, held=held)
            seconds = time.perf_counter() - started
            usage["calls"] += 1
            for key, number in counts.items():
                usage[key] += number
            request = {"messages": [dict(m) for m in chat], "schema": schema, "settings": _plain(room), "seed": seed}
            context.emit(
                "model_call", model=self.checkpoint_ref, request=request, answer=answer.text, seconds=seconds, **counts
            )
            wrong = self._wrong(answer, schema) if schema is not None else []
            if not wrong:
                return {"answer": answer.text, "messages": [dict(m) for m in chat], "usage": usage}
        raise OutputContractError(
            f"{self.checkpoint_ref} gave no valid structure in {1 + settings.max_repairs} attempts: "
            f"{'; '.join(wrong)}; raise params.max_new_tokens ({settings.max_new_tokens}) or bound the schema more. "
            f"It wrote: {answer.text[:2000]}"
        )

    @staticmethod
    def _wrong(answer: _Answer, schema: Mapping[str, Any]) -> list[str]:
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

    def _answer_ids(self, text: str) -> list[int]:
        end = self.tokenizer.eos_token_id
        ids = list(self.tokenizer(self._marks().sub(" ", text), add_special_tokens=False).input_ids)
        return [*ids, min(self._end_ids()) if end is None else end]

    # ---- decoding

    def _decode(self, prompt: list[int], settings: Settings, seed: int, schema: Any) -> _Answer:
        import torch

        context, device = current_context(), next(self.module.parameters()).device
        random = torch.Generator(device="cpu").manual_seed(seed)
        warp = _warpers(settings)
        guide = self._matcher(schema) if schema is not None else None
        ends, words = self._end_ids(), len(self.tokenizer)
        copies = _Copies(prompt, settings.no_repeat_ngram) if settings.no_repeat_ngram else None
        answer, cache, fresh, shown = _Answer([], False), None, list(prompt), ""
        with torch.no_grad():
            while not answer.ended and len(answer.ids) < settings.max_new_tokens:
                out = self.module(
                    input_ids=torch.tensor([fresh], device=device),
                    cache=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = out.cache
                scores = out.logits[:, -1, :words].float().cpu()  # models may have more rows than tokens
                self._penalise(scores, answer.ids, settings.repetition_penalty)
                if copies is not None:
                    scores[:, copies.now()] -= COPY_COST
                if guide is not None:
                    mask = torch.frombuffer(bytearray(guide.compute_logit_bias()), dtype=torch.uint8)
                    scores.masked_fill_(mask[:words] == 0, -torch.inf)
                elif not answer.ids:
                    scores[:, sorted(ends)] = -torch.inf  # an answer is never empty
                token = _draw(scores, settings, warp, random)
                fresh = [token]
                if guide is not None:
                    if not guide.consume_token(token):
                        raise OutputContractError(
                            f"{self.checkpoint_ref}: decoding under the schema failed: {guide.get_error()}"
                        )
                    if token not in ends:
                        forced = guide.compute_ff_tokens()[: settings.max_new_tokens - len(answer.ids) - 1]
                        if forced and guide.consume_tokens(forced):
                            fresh += forced
                    answer.ended = guide.is_stopped()
                if token in ends:
                    answer.ended = True
                    break
                before = len(answer.ids) // EMIT_EVERY
                answer.ids += fresh
                if copies is not None:
                    copies.add(fresh)
                if settings.stop or len(answer.ids) // EMIT_EVERY != before:
                    answer.text = self.tokenizer.decode(answer.ids, skip_special_tokens=True).lstrip()
                    cut = min((at for at in map(answer.text.find, settings.stop) if at >= 0), default=None)
                    if cut is not None and guide is None:
                        answer.text, answer.ended = answer.text[:cut], True
                        return answer
                    if len(answer.ids) // EMIT_EVERY != before:
                        piece, shown = answer.text[len(shown) :], answer.text
                        context.emit("progress", done=len(answer.ids), total=settings.max_new_tokens, text=piece)
        answer.text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        if schema is None:
            answer.text = answer.text.strip()
            if settings.whole_sentences and not answer.ended:
                answer.text = whole_sentences(answer.text)
        return answer

    def _end_ids(self) -> set[int]:
        known = self.module.generation_config.eos_token_id
        ends = {known} if isinstance(known, int) else set(known or ())
        return ends | ({self.tokenizer.eos_token_id} if self.tokenizer.eos_token_id is not None else set())

    def _penalise(self, scores: Any, written: list[int], penalty: float) -> None:
        """Make words that were written before less likely; punctuation stays free, or structure would suffer."""
        import torch

        if penalty == 1 or not written:
            return
        if self._words is None:
            tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
            self._words = torch.tensor([any(c.isalnum() for c in str(t).lstrip("Ġ▁")) for t in tokens])
        seen = torch.tensor(sorted(set(written[-PENALTY_WINDOW:])))
        seen = seen[self._words[seen]]
        picked = scores[:, seen]
        scores[:, seen] = torch.where(picked < 0, picked * penalty, picked / penalty)

    def _matcher(self, schema: Mapping[str, Any]) -> Any:
        """A fresh llguidance matcher for a schema. Raises: ConfigError when it cannot be decoded under."""
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingExtraError("a schema needs llguidance: pip install llguidance") from error
        if self._guide is None:
            width = self.module.get_output_embeddings().weight.shape[0]
            self._guide = from_tokenizer(self.tokenizer, n_vocab=width, eos_token=sorted(self._end_ids()))
        form: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(bounded(schema)), None, form)
        matcher = LLMatcher(self._guide, grammar)
        if matcher.is_error():
            raise ConfigError(f"cannot decode under this JSON schema: {matcher.get_error()[:400]}")
        return matcher


def _warpers(settings: Settings) -> Any:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    chain = LogitsProcessorList()
    if settings.temperature > 0:
        chain.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_p < 1:
        chain.append(TopPLogitsWarper(settings.top_p))
    return chain


def _draw(scores: Any, settings: Settings, warp: Any, random: Any) -> int:
    """The next token; the `top_k` are taken first, so that nothing sorts the whole vocabulary."""
    import torch

    if settings.temperature == 0:
        return int(scores.argmax())
    values, ids = scores.topk(min(settings.top_k or scores.shape[1], scores.shape[1]))
    return int(ids[0, torch.multinomial(warp(None, values).softmax(-1), 1, generator=random)])


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in Settings.__dataclass_fields__ if name != "seed"}

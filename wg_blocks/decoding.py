"""Decoding: from the scores that a causal model gives to text, one answer or a padded batch of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from wg_blocks.prompt import Settings, sentences_end, whole_sentences
from wg_blocks.reading import Layers, Reader, reader_of, rows_of
from wg_core.errors import OutputContractError
from wg_core.execution.context import FRAME, check_stop
from wg_core.weights.lora import per_row

PENALTY_WINDOW = 256
EMIT_EVERY = 8
MAX_DIGITS = 16  # tokens of digits in a row under a schema, which bounds a number but not its decimal places
COLDEST = 1e-6  # below this temperature the likeliest token is taken: scores divided by less may be no numbers
LAST_RESORT = 100.0  # taken off a token's score: below any other, yet possible where a schema leaves no choice
PIECE = 64  # tokens of a prompt that are computed together, at most
PREFIX_BYTES = 96 << 20  # of keys and values that one model keeps of earlier prompts


class Vocabulary:
    """What decoding knows of a tokenizer: which tokens end an answer, are parts of words, or digits and nothing else."""

    def __init__(self, tokenizer: Any, ends: set[int]) -> None:
        import torch

        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.ends = sorted(ends)
        self.words = torch.tensor([any(c.isalnum() for c in str(t).lstrip("Ġ▁")) for t in tokens])
        self.digits = torch.tensor([str(t).isdecimal() for t in tokens])

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Writer:
    """One answer in the making: `ids` and `text`, and whether it ended by itself (end token, stop text, structure).

    `guide` is a matcher of the JSON schema that the answer obeys; other prompts are likely to begin with the first
    `shared` tokens of this one.
    """

    def __init__(
        self, prompt: Sequence[int], settings: Settings, seed: int, vocabulary: Vocabulary, guide: Any, model: str,
        shared: int = 0,
    ) -> None:  # fmt: skip
        import torch

        self.prompt = list(prompt)
        self.shared = shared
        self.settings = settings
        self.vocabulary = vocabulary
        self.guide = guide
        self.model = model
        self.ids: list[int] = []
        self.text = ""
        self.ended = False
        self.shown = ""
        self._digits = 0  # how many tokens of digits stand at the end
        self.random = torch.Generator(device="cpu").manual_seed(seed)
        self._warpers = _warpers(settings)
        self._copies = _Copies(prompt, settings.no_repeat_ngram) if settings.no_repeat_ngram else None

    @property
    def done(self) -> bool:
        return self.ended or len(self.ids) >= self.settings.max_new_tokens

    def write(self, scores: Any) -> list[int]:
        """Take the next token by its `scores` [1, tokens]; gives it with those that the structure leaves no choice of."""
        import torch

        self._penalise(scores)
        if self._copies is not None:
            scores[:, self._copies.now()] -= LAST_RESORT
        if self.guide is not None and self._digits >= MAX_DIGITS:
            scores[:, self.vocabulary.digits] -= LAST_RESORT
        if self.guide is not None:
            mask = torch.frombuffer(bytearray(self.guide.compute_logit_bias()), dtype=torch.uint8)
            scores.masked_fill_(mask[: self.vocabulary.size] == 0, -torch.inf)
        elif not self.ids:
            scores[:, self.vocabulary.ends] = -torch.inf  # an answer is never empty
        token = _draw(scores, self.settings, self._warpers, self.random)
        fresh = [token]
        if self.guide is not None:
            fresh += self._guided(token)
        if token in self.vocabulary.ends:
            self.ended = True
            return []
        before = len(self.ids) // EMIT_EVERY
        self.ids += fresh
        for each in fresh:
            self._digits = self._digits + 1 if self.vocabulary.digits[each] else 0
        if self._copies is not None:
            self._copies.add(fresh)
        if self.settings.stop or len(self.ids) // EMIT_EVERY != before:
            self.text = self.vocabulary.text(self.ids).lstrip()
            cut = min((at for at in map(self.text.find, self.settings.stop) if at >= 0), default=None)
            if cut is not None and self.guide is None:
                self.text, self.ended = self.text[:cut], True
        return fresh

    def _guided(self, token: int) -> list[int]:
        if not self.guide.consume_token(token):
            raise OutputContractError(f"{self.model}: decoding under the schema failed: {self.guide.get_error()}")
        forced: list[int] = []
        if token not in self.vocabulary.ends:
            forced = self.guide.compute_ff_tokens()[: self.settings.max_new_tokens - len(self.ids) - 1]
            if forced and not self.guide.consume_tokens(forced):
                forced = []
        self.ended = self.guide.is_stopped()
        return forced

    def _penalise(self, scores: Any) -> None:
        """Make words that were written before less likely; punctuation stays free, or structure would suffer."""
        import torch

        penalty = self.settings.repetition_penalty
        if penalty == 1 or not self.ids:
            return
        seen = torch.tensor(sorted(set(self.ids[-PENALTY_WINDOW:])))
        seen = seen[self.vocabulary.words[seen]]
        picked = scores[:, seen]
        scores[:, seen] = torch.where(picked < 0, picked * penalty, picked / penalty)

    def piece(self) -> str:
        """What is new of the text since the last look, without what may yet turn out to be left out."""
        text = self.vocabulary.text(self.ids).lstrip()
        held = max((len(s) - 1 for s in self.settings.stop), default=0)
        text = text[: len(text) - held].rstrip("\ufffd").rstrip()
        if self.settings.whole_sentences:
            text = text[: sentences_end(text)]
        return self._shown(text)

    def last_piece(self) -> str:
        """What `piece` has held back of the finished text."""
        return self._shown(self.text)

    def _shown(self, text: str) -> str:
        if not text.startswith(self.shown):
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece

    def finish(self) -> None:
        """Make the text whole: as it is under a schema, else trimmed, to its last sentence where that was asked for."""
        if self.guide is not None:
            self.text = self.vocabulary.text(self.ids)
            return
        if not (self.ended and self.settings.stop and self.text):
            self.text = self.vocabulary.text(self.ids)
        self.text = self._cut(self.text.strip())
        if self.settings.whole_sentences and not self.ended:
            self.text = whole_sentences(self.text)

    def _cut(self, text: str) -> str:
        return text[: min((at for at in map(text.find, self.settings.stop) if at >= 0), default=len(text))]


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


def _warpers(settings: Settings) -> list[Any]:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    chain: list[Any] = []
    if settings.temperature >= COLDEST:
        chain.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_p < 1:
        chain.append(TopPLogitsWarper(settings.top_p))
    return chain


def _draw(scores: Any, settings: Settings, warpers: Sequence[Any], random: Any) -> int:
    """The next token; the `top_k` are taken first, so that nothing sorts the whole vocabulary."""
    import torch

    if settings.temperature < COLDEST:
        return int(scores.argmax())
    values, ids = scores.topk(min(settings.top_k or scores.shape[1], scores.shape[1]))
    for warp in warpers:
        values = warp(None, values)
    return int(ids[0, torch.multinomial(values.softmax(-1), 1, generator=random)])


# ---- what is kept of prompts ------------------------------------------------------------------------------------------


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers two sequences begin with alike."""
    shorter = min(len(one), len(other))
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), shorter)


def ends_of_pieces(size: int, shared: int) -> list[int]:
    """Where the pieces of a prompt of `size` tokens end: one at the end of its `shared` begin, all of at most `PIECE`."""
    return [*range(PIECE, shared, PIECE), *([shared] if shared else ()), *range(shared + PIECE, size, PIECE), size]


class _Begin(NamedTuple):
    """The begin of a prompt that is kept: its tokens, and where their pieces end."""

    key: Any
    ids: tuple[int, ...]
    ends: tuple[int, ...]

    def begins_with(self, other: _Begin) -> bool:
        ids, ends = self.ids[: len(other.ids)], self.ends[: len(other.ends)]
        return _Begin(self.key, ids, ends) == other


class PrefixCache:
    """Keys and values of the last prompts, at most `limit` bytes, so that a shared begin is computed once.

    A prompt is computed in pieces (see `ends_of_pieces`), with or without this cache, and only pieces that end alike
    from the begin on are taken from it. So each number is the result of the very same computation, and answers are
    equal to the bit. `key` says what else the numbers depend on: revision of the weights and adapters at work.
    """

    def __init__(self, limit: int = PREFIX_BYTES) -> None:
        self.limit = limit
        self._kept: OrderedDict[_Begin, Layers] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(layers) for layers in self._kept.values())

    def find(self, key: Any, ids: Sequence[int], ends: Sequence[int]) -> tuple[int, Layers]:
        """How many tokens of the begin of `ids` are kept, at least one short of all, and what is kept of them."""
        with self._lock:
            best, owner = 0, None
            for kept in self._kept:
                if kept.key != key:
                    continue
                same, pieces = agreeing(kept.ids, ids), agreeing(kept.ends, ends[:-1])
                size = max((end for end in kept.ends[:pieces] if end <= same), default=0)
                if size > best:
                    best, owner = size, kept
            if owner is None:
                return 0, []
            self._kept.move_to_end(owner)
            return best, [(k[:, :, :best], v[:, :, :best]) for k, v in self._kept[owner]]

    def keep(self, key: Any, ids: Sequence[int], ends: Sequence[int], layers: Layers) -> None:
        """Keep a prompt up to its last piece, in place of those that it begins with and of the longest unused."""
        whole = tuple(ends[:-1])
        if not whole:
            return
        size = whole[-1]
        new = _Begin(key, tuple(ids[:size]), whole)
        with self._lock:
            if any(kept.begins_with(new) for kept in self._kept):
                return
            for known in [kept for kept in self._kept if new.begins_with(kept)]:
                del self._kept[known]
            self._kept[new] = [(k[:, :, :size].clone(), v[:, :, :size].clone()) for k, v in layers]
            while self._kept and self.nbytes > self.limit:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


def _nbytes(layers: Layers) -> int:
    return sum(t.numel() * t.element_size() for pair in layers for t in pair)


def _stop() -> None:
    """Raises: AbortRun, RunTimeoutError where the run is to stop."""
    frame = FRAME.get()
    if frame is not None:
        check_stop(frame)


# ---- the loop -------------------------------------------------------------------------------------------------------


def read_prompt(
    reader: Reader, ids: Sequence[int], prefixes: PrefixCache | None, key: Any, shared: int = 0
) -> tuple[Any, int]:
    """(scores of the next token [1, rows], tokens that needed no computing) of a prompt; goes on in `reader`.

    `shared` is the number of its first tokens that other prompts are likely to begin with.
    """
    ends = ends_of_pieces(len(ids), shared)
    known, layers = prefixes.find(key, ids, ends) if prefixes is not None else (0, [])
    reader.begin(layers)
    at, scores = known, None
    for end in ends:
        if end > known:
            _stop()
            scores = reader.read(ids[at:end], scores=end == len(ids))
            at = end
    if prefixes is not None and reader.layers is not None:
        prefixes.keep(key, ids, ends, reader.layers)
    assert scores is not None  # a prompt is never empty, and the last token is always computed
    return scores, known


def decode(
    model: Any, writer: Writer, prefixes: PrefixCache | None, key: Any, tell: Callable[[Writer], None]
) -> Generator[str, None, int]:
    """Write one answer to its end: yields pieces of text, returns how many tokens of the prompt were known already.

    `tell` is called every few tokens, and may stop all by an exception.
    """
    import torch

    reader, words = reader_of(model), writer.vocabulary.size
    with torch.no_grad():
        scores, known = read_prompt(reader, writer.prompt, prefixes, key, writer.shared)
    while True:
        before = len(writer.ids) // EMIT_EVERY
        with torch.no_grad():  # models may have more rows than tokens
            fresh = writer.write(scores[:, :words].float().cpu())
        if len(writer.ids) // EMIT_EVERY != before:
            tell(writer)
        if writer.done:
            break
        if len(writer.ids) // EMIT_EVERY != before and (piece := writer.piece()):
            yield piece
        _stop()
        with torch.no_grad():
            scores = reader.read(fresh)
    writer.finish()
    if piece := writer.last_piece():
        yield piece
    return known


def decode_batch(
    model: Any,
    writers: Sequence[Writer],
    prefixes: PrefixCache | None,
    keys: Sequence[Any],
    tell: Callable[[Writer], None],
    adapters: Sequence[Collection[object]],
) -> list[int] | None:
    """Write answers together; what one is does not depend on the others but for rounding.

    `keys` and `adapters` are those of each answer. Returns the known tokens of each prompt; None, with nothing written,
    for a model that keeps more than keys and values of what it read.
    """
    import torch

    def adapted(rows: Sequence[int]) -> AbstractContextManager[None]:
        return per_row([adapters[row] for row in rows])

    def left_adapted(rows: Sequence[int]) -> AbstractContextManager[None]:
        return adapted([places[row] for row in rows])

    words = writers[0].vocabulary.size
    rows = list(writers)
    known: list[int] = []
    readers = [reader_of(model) for _ in rows]
    scores: list[Any] = []
    with torch.no_grad():
        for row, (writer, reader) in enumerate(zip(rows, readers, strict=True)):
            with adapted([row]):
                score, cached = read_prompt(reader, writer.prompt, prefixes, keys[row], writer.shared)
            if reader.layers is None:
                return None
            known.append(cached)
            scores.append(score[0])
        joint = rows_of(readers)
        places = list(range(len(rows)))  # of what is left of the rows, among all
        waiting: list[list[int]] = [[] for _ in rows]  # tokens that are written, but not read yet
        while True:
            for row, writer in enumerate(rows):
                if not waiting[row] and not writer.done:
                    before = len(writer.ids) // EMIT_EVERY
                    waiting[row] = writer.write(scores[row][None, :words].float().cpu())
                    if len(writer.ids) // EMIT_EVERY != before:
                        tell(writer)
            going = [row for row, writer in enumerate(rows) if not writer.done]
            if not going:
                break
            if len(going) < len(rows):
                joint.keep(going)
                rows, waiting, places = ([x[row] for row in going] for x in (rows, waiting, places))
            _stop()
            scores = list(joint.read(waiting, left_adapted))
    for writer in writers:
        writer.finish()
    return known

"""How a causal model reads tokens one after another: by its own forward pass, or by a shorter one for models like Llama.

Both keep the keys and values of what was read, and give the scores of the token that comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

Layers = list[tuple[Any, Any]]
"""Keys and values of each layer, [batch, heads of keys, tokens, head size]."""

Adapted = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""What is around the computation of a batch whose rows belong to these sequences."""


def reader_of(model: Any) -> Reader:
    """What reads tokens for a causal model: its own reader, or one for models of transformers."""
    if hasattr(model, "reader"):
        return model.reader()
    return LlamaReader(model) if LlamaReader.fits(model) else Reader(model)


def layers_of(cache: Any) -> Layers | None:
    """Keys and values of a cache of transformers; None where it keeps anything else of what was read."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
        return None
    return [(layer.keys, layer.values) for layer in layers]


def cache_of(model: Any, layers: Layers) -> Any:
    """A cache of transformers that holds these keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


class Reader:
    """Reads one sequence by the model's own forward pass; `layers` is what is known of its begin."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._cache: Any = None

    def begin(self, layers: Layers) -> None:
        """Go on after these keys and values."""
        self._cache = cache_of(self.model, layers) if layers else None

    def read(self, ids: Sequence[int], *, scores: bool = True) -> Any:
        """Read tokens; gives the scores of the next one, [1, rows of the output layer], if they are wanted."""
        import torch

        given = torch.tensor([ids], device=self.device)
        out = self.model(input_ids=given, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.cache
        return out.logits[:, -1]

    @property
    def layers(self) -> Layers | None:
        """What is kept of all that was read; None where it is more than keys and values."""
        return layers_of(self._cache)


class RoomReader(Reader):
    """Keeps keys and values in room that grows by doubling, [layers, 2, 1, heads of keys, tokens, head size]."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._room: Any = None
        self._at = 0

    def new_room(self, tokens: int) -> Any:
        """Room for so many tokens."""
        raise NotImplementedError

    def begin(self, layers: Layers) -> None:
        size = layers[0][0].shape[-2] if layers else 0
        self._at = 0
        self._make_room(size)
        for room, pair in zip(self._room, layers, strict=bool(layers)):
            for kept, given in zip(room, pair, strict=True):
                kept[:, :, :size] = given
        self._at = size

    def _make_room(self, size: int) -> None:
        """Have room for `size` tokens, and in it what was read up to now."""
        old = self._room
        if old is not None and old.shape[-2] >= size:
            return
        self._room = self.new_room(max(size, 256, 0 if old is None else 2 * old.shape[-2]))
        if old is not None:
            self._room[..., : self._at, :] = old[..., : self._at, :]

    @property
    def layers(self) -> Layers:
        return [(keys[:, :, : self._at], values[:, :, : self._at]) for keys, values in self._room]


class LlamaReader(RoomReader):
    """Reads by the layers of a `LlamaForCausalLM`, in fewer operations than the model's own pass.

    That one copies all keys and values for each token. Embeddings and linear layers are called as modules, so adapters
    work; numbers differ from those of the model's own pass by rounding. Formulas: Touvron et al. 2023
    (https://arxiv.org/abs/2302.13971), rotary embedding of Su et al. 2021 (https://arxiv.org/abs/2104.09864) with halves
    as in transformers, grouped queries of Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245).
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config, first = model.config, model.model.layers[0].self_attn
        self.device = model.model.norm.weight.device
        self._heads, self._kept, self._size = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        self._norm = {"normalized_shape": (config.hidden_size,), "eps": config.rms_norm_eps}
        self._scale = first.scaling

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether a model is one of those, in use and not in training, and nothing listens to what is passed over."""
        from transformers import LlamaForCausalLM

        if type(model) is not LlamaForCausalLM or model.training:
            return False
        blocks = (m for layer in model.model.layers for m in (layer, layer.self_attn, layer.mlp))
        norms = (m for layer in model.model.layers for m in (layer.input_layernorm, layer.post_attention_layernorm))
        passed = (model, model.model, model.model.norm, *blocks, *norms)
        return not any(m._forward_hooks or m._forward_pre_hooks for m in passed)

    def new_room(self, tokens: int) -> Any:
        import torch

        shape = (len(self.model.model.layers), 2, 1, self._kept, tokens, self._size)
        return torch.empty(shape, dtype=self.model.model.norm.weight.dtype, device=self.device)

    def read(self, ids: Sequence[int], *, scores: bool = True) -> Any:
        return self.read_rows([self], [ids], scores=scores)

    @staticmethod
    def read_rows(
        readers: Sequence[LlamaReader], ids: Sequence[Sequence[int]], adapted: Adapted | None = None, *, scores: bool = True
    ) -> Any:
        """Read some tokens in each of several sequences; scores of the next one of each, [sequences, rows of the output].

        Linear layers are given the tokens of all, [tokens, features], so that weights are read from memory once; each
        sequence attends to its own. `adapted(sequence of each row)` is around what is computed of these rows.
        """
        import torch
        from torch.nn.functional import rms_norm, scaled_dot_product_attention

        one = readers[0]
        model, heads, size, norm = one.model.model, one._heads, one._size, one._norm
        spans: list[tuple[LlamaReader, slice, slice, Any]] = []  # whose tokens, where they stand, where they go, what they see
        first = 0
        for reader, given in zip(readers, ids, strict=True):
            number, begin = len(given), reader._at
            end = begin + number
            reader._make_room(end)
            reader._at = end
            seen = torch.ones(number, end, dtype=torch.bool, device=one.device).tril_(begin) if number > 1 else None
            spans.append((reader, slice(first, first + number), slice(begin, end), seen))
            first += number
        around = adapted or (lambda rows: nullcontext())
        with around([row for row, given in enumerate(ids) for _ in given]):
            x = model.embed_tokens(torch.tensor([token for given in ids for token in given], device=one.device))
            places = torch.cat([torch.arange(to.start, to.stop, device=one.device) for _, _, to, _ in spans])
            cos, sin = (t[0, :, None] for t in model.rotary_emb(x, places[None]))
            half = size // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
            for number, layer in enumerate(model.layers):
                at, mlp = layer.self_attn, layer.mlp
                h = rms_norm(x, weight=layer.input_layernorm.weight, **norm)
                both = torch.cat([at.q_proj(h), at.k_proj(h)], -1).view(first, heads + one._kept, size)
                both = (both * cos).addcmul_(both.roll(half, -1), sin).transpose(0, 1)
                new = at.v_proj(h).view(first, one._kept, size).transpose(0, 1)
                mixed: list[Any] = []
                for reader, of, to, seen in spans:
                    keys, values = reader._room[number]
                    keys[0, :, to], values[0, :, to] = both[heads:, of], new[:, of]
                    mixed.append(scaled_dot_product_attention(
                        both[None, :heads, of], keys[:, :, : to.stop], values[:, :, : to.stop], attn_mask=seen,
                        scale=one._scale, enable_gqa=True,
                    )[0].transpose(0, 1))  # fmt: skip
                x = x + at.o_proj((mixed[0] if len(mixed) == 1 else torch.cat(mixed)).reshape(first, heads * size))
                h = rms_norm(x, weight=layer.post_attention_layernorm.weight, **norm)
                x = x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)).mul_(mlp.up_proj(h)))
        if not scores:
            return None
        with around(range(len(readers))):
            return one.model.lm_head(rms_norm(x[[of.stop - 1 for _, of, _, _ in spans]], weight=model.norm.weight, **norm))


def rows_of(readers: Sequence[Reader]) -> Rows:
    """What reads on in several sequences at once, each of which was begun by a reader of its own."""
    return LlamaRows(readers) if all(isinstance(reader, LlamaReader) for reader in readers) else PaddedRows(readers)


class Rows:
    """Several sequences that are read on together."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = list(readers)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self.readers = [self.readers[row] for row in rows]

    def read(self, waiting: Sequence[list[int]], adapted: Adapted) -> Any:
        """Read from the begin of each list, out of which it takes what it read; scores of the next token of each."""
        raise NotImplementedError


class LlamaRows(Rows):
    """All that waits is read in one pass, and nothing is padded."""

    def read(self, waiting: Sequence[list[int]], adapted: Adapted) -> Any:
        given = [list(tokens) for tokens in waiting]
        for tokens in waiting:
            tokens.clear()
        return LlamaReader.read_rows(cast("list[LlamaReader]", self.readers), given, adapted)


class PaddedRows(Rows):
    """One token of each is read, by the model's own pass over a cache that is padded on the left."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        import torch

        super().__init__(readers)
        self.model = readers[0].model
        read = [cast(Layers, reader.layers) for reader in readers]
        self._sizes = [layers[0][0].shape[-2] for layers in read]
        longest, device = max(self._sizes), readers[0].device
        padded = [_padded([layers[i] for layers in read], longest) for i in range(len(read[0]))]
        self._cache = cache_of(self.model, padded)
        self._mask = torch.tensor([[0] * (longest - size) + [1] * size for size in self._sizes], device=device)

    def keep(self, rows: Sequence[int]) -> None:
        import torch

        super().keep(rows)
        index = torch.tensor(rows, device=self._mask.device)
        self._cache.batch_select_indices(index)
        self._sizes, self._mask = [self._sizes[row] for row in rows], self._mask[index]

    def read(self, waiting: Sequence[list[int]], adapted: Adapted) -> Any:
        import torch

        device = self._mask.device
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(waiting), 1)], dim=1)
        fed = torch.tensor([[tokens.pop(0)] for tokens in waiting], device=device)
        at = torch.tensor([[size] for size in self._sizes], device=device)
        with adapted(range(len(waiting))):
            out = self.model(
                input_ids=fed, cache=self._cache, use_cache=True, logits_to_keep=1, attention_mask=self._mask,
                position_ids=at,
            )  # fmt: skip
        self._cache, self._sizes = out.cache, [size + 1 for size in self._sizes]
        return out.logits[:, -1]


def _padded(pairs: Sequence[tuple[Any, Any]], size: int) -> tuple[Any, Any]:
    from torch.nn.functional import pad

    def joined(tensors: list[Any]) -> Any:
        import torch

        return torch.cat([pad(t, (0, 0, size - t.shape[-2], 0)) for t in tensors])

    return joined([k for k, _ in pairs]), joined([v for _, v in pairs])

"""How a causal model reads tokens one after another: by its own forward pass, or by a shorter one for models like Llama.

Both keep the keys and values of what was read, and give the scores of the token that comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Layers = list[tuple[Any, Any]]
"""Keys and values of each layer, [batch, heads of keys, tokens, head size]."""


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


class LlamaReader(Reader):
    """Reads by the layers of a `LlamaForCausalLM`, in fewer operations, into room that grows by doubling.

    The model's own pass copies all keys and values for each token. Embeddings and linear layers are called as modules,
    so adapters and 8-bit weights work; numbers differ from those of the model's own pass by rounding. Formulas: Touvron
    et al. 2023 (https://arxiv.org/abs/2302.13971), rotary embedding of Su et al. 2021 (https://arxiv.org/abs/2104.09864)
    with halves as in transformers, grouped queries of Ainslie et al. 2023 (https://arxiv.org/abs/2305.13245).
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config, first = model.config, model.model.layers[0].self_attn
        self._heads, self._kept, self._size = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        self._norm = {"normalized_shape": (config.hidden_size,), "eps": config.rms_norm_eps}
        self._scale = first.scaling
        self._room: Any = None
        self._at = 0

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

    def begin(self, layers: Layers) -> None:
        self._at = 0
        if layers:
            size = layers[0][0].shape[-2]
            self._make_room(size)
            for room, pair in zip(self._room, layers, strict=True):
                for kept, given in zip(room, pair, strict=True):
                    kept[:, :, :size] = given
            self._at = size

    def _make_room(self, size: int) -> None:
        import torch

        old = self._room
        if old is not None and old.shape[-2] >= size:
            return
        layers, weight = self.model.model.layers, self.model.model.norm.weight
        shape = (len(layers), 2, 1, self._kept, max(size, 256, 2 * (0 if old is None else old.shape[-2])), self._size)
        self._room = torch.empty(shape, dtype=weight.dtype, device=self.device)
        if old is not None:
            self._room[..., : self._at, :] = old[..., : self._at, :]

    def read(self, ids: Sequence[int], *, scores: bool = True) -> Any:
        import torch
        from torch.nn.functional import rms_norm, scaled_dot_product_attention

        model, begin, number = self.model.model, self._at, len(ids)
        end = begin + number
        self._make_room(end)
        x = model.embed_tokens(torch.tensor([ids], device=self.device))
        cos, sin = (t[:, :, None] for t in model.rotary_emb(x, torch.arange(begin, end, device=self.device)[None]))
        half = self._size // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        seen = torch.ones(number, end, dtype=torch.bool, device=self.device).tril_(begin) if number > 1 else None
        for layer, (keys, values) in zip(model.layers, self._room, strict=True):
            at, mlp = layer.self_attn, layer.mlp
            h = rms_norm(x, weight=layer.input_layernorm.weight, **self._norm)
            both = torch.cat([at.q_proj(h), at.k_proj(h)], -1).view(1, number, self._heads + self._kept, self._size)
            both = (both * cos).addcmul_(both.roll(half, -1), sin).transpose(1, 2)
            keys[:, :, begin:end] = both[:, self._heads :]
            values[:, :, begin:end] = at.v_proj(h).view(1, number, self._kept, self._size).transpose(1, 2)
            mixed = scaled_dot_product_attention(
                both[:, : self._heads], keys[:, :, :end], values[:, :, :end], attn_mask=seen, scale=self._scale,
                enable_gqa=True,
            )  # fmt: skip
            x = x + at.o_proj(mixed.transpose(1, 2).reshape(1, number, self._heads * self._size))
            h = rms_norm(x, weight=layer.post_attention_layernorm.weight, **self._norm)
            x = x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)).mul_(mlp.up_proj(h)))
        self._at = end
        if not scores:
            return None
        return self.model.lm_head(rms_norm(x[:, -1:], weight=model.norm.weight, **self._norm))[:, -1]

    @property
    def layers(self) -> Layers:
        return [(keys[:, :, : self._at], values[:, :, : self._at]) for keys, values in self._room]

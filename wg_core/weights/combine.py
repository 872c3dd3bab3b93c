"""Several low-rank adapters of one block made into one, and adapters made part of the weights: both computed by PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from wg_core.errors import AdapterError, MissingExtraError
from wg_core.weights.lora import NAME, Shape, learning_as_before, lora_config, slot_key

if TYPE_CHECKING:
    from torch import Tensor, nn

COMBINED = "combined"

Learned = tuple[Shape, Mapping[str, "Tensor"]]


def combine(
    layers: Mapping[str, nn.Module],
    adapters: Sequence[Learned],
    weights: Sequence[float],
    *,
    combination_type: str,
    **more: Any,
) -> Learned:
    """The weighted sum of adapters as one adapter, by `LoraModel.add_weighted_adapter` of PEFT with all its settings.

    `layers` are the base's by slot, each adapter is its shape and state. `cat` is exact and adds the ranks up, `svd`
    is the best of a rank (Eckart and Young 1936), `linear` sums the factors and needs equal ranks.

    Raises: AdapterError for what PEFT refuses.
    """
    import torch
    from torch import nn

    try:
        from peft import LoraModel
    except ImportError as error:
        raise MissingExtraError("low-rank adapters need PEFT: pip install peft") from error
    slots = {slot: layers[slot] for shape, _ in adapters for slot in shape.ranks}
    holder = nn.ModuleDict({slot_key(slot): layer for slot, layer in slots.items()})
    configs = {f"a{i}": lora_config(shape, shape.ranks) for i, (shape, _) in enumerate(adapters)}
    with learning_as_before(holder), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            model = cast("Any", LoraModel)(holder, configs["a0"], "a0")
            for name in list(configs)[1:]:
                model.peft_config[name] = configs[name]
                model.inject_adapter(holder, name)
            named = dict(holder.named_parameters())
            for name, (_, state) in zip(configs, adapters, strict=True):
                for key, value in state.items():
                    named[_renamed(key, name)].copy_(value)
            model.add_weighted_adapter(list(configs), list(weights), COMBINED, combination_type=combination_type, **more)
        except (ValueError, TypeError) as error:
            raise AdapterError(f"PEFT cannot combine these adapters: {error}") from error
        made = {
            _renamed(key, NAME, COMBINED): value.detach().clone().contiguous()
            for key, value in holder.named_parameters()
            if COMBINED in key.split(".")
        }
        ranks = {slot: _rank(made, slot) for slot in slots}
        scales = {slot: cast("Any", holder[slot_key(slot)]).scaling[COMBINED] for slot in slots}
    return Shape(ranks, {slot: scales[slot] * rank for slot, rank in ranks.items()}), made


def _renamed(key: str, new: str, old: str = NAME) -> str:
    return ".".join(new if part == old else part for part in key.split("."))


def _rank(state: Mapping[str, Any], slot: str) -> int:
    key = slot_key(slot)
    first = state.get(f"{key}.lora_A.{NAME}.weight")
    return int((first if first is not None else state[f"{key}.lora_embedding_A.{NAME}"]).shape[0])


def merge_into(layers: Mapping[str, nn.Module], adapted: Mapping[str, nn.Module]) -> None:
    """Add what adapter layers do to the weights of `layers`, both by slot key; those of a copy, never of a shared base."""
    import torch

    with torch.no_grad():
        for key, layer in adapted.items():
            delta = cast("Any", layer).get_delta_weight(NAME)
            weight = cast("Any", layers[key]).weight
            weight.add_(delta.to(weight.dtype).to(weight.device))

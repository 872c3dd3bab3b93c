"""Adapters on disk as PEFT keeps them, with the identity and hash of their base beside them.

A folder holds `adapter_config.json` and `adapter_model.safetensors` (https://huggingface.co/docs/peft/developer_guides/checkpoint),
and `base.json`: which block the adapter was learned on, the hash of its weights, and that of the adapter itself. PEFT reads such a folder without
this project; a folder that PEFT wrote has no `base.json`, and is checked by the shapes of its tensors alone.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wg_core.errors import AdapterError, CheckpointError, MissingExtraError, MissingModelError, did_you_mean
from wg_core.state.canonical import read_mapping
from wg_core.state.files import make_folder, write_file
from wg_core.weights.backends import get_backend, read_tensors
from wg_core.weights.lora import NAME, Shape, slot_key
from wg_core.weights.module import ModuleBlock, state_hash

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
_PREFIX = "base_model.model."

# What PEFT writes that changes nothing of what an adapter with these tensors computes.
_KNOWN = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type", "task_type", "inference_mode", "auto_mapping",
    "base_model_name_or_path", "revision", "peft_version", "megatron_core", "qalora_group_size",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it was read: its shape, its tensors under the names of an adapter block, and what it says of its base."""

    shape: Shape
    state: Mapping[str, Tensor]
    base: Mapping[str, Any]


def _root(base: ModuleBlock) -> str:
    """What stands before the names of a lone module, which alone is the model for PEFT; empty where there are several."""
    names = list(base.modules)
    return f"{names[0]}." if len(names) == 1 and names[0] not in base.slot_modules() else ""


def write_adapter(
    folder: Path, base: ModuleBlock, shape: Shape, state: Mapping[str, Tensor], identity: Mapping[str, Any]
) -> None:
    """Write the adapter of `base` into `folder`. `state` has the names of an adapter block; `identity` goes to `base.json` too."""
    from peft import LoraConfig

    make_folder(folder)
    root = _root(base)
    names = {slot: slot.removeprefix(root) for slot in shape.ranks}
    rank, alpha = Counter(shape.ranks.values()).most_common(1)[0][0], Counter(shape.alphas.values()).most_common(1)[0][0]
    causal = any(hasattr(m, "prepare_inputs_for_generation") for m in base.modules.values())
    config = LoraConfig(
        r=rank, lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=shape.dropout, inference_mode=True, task_type="CAUSAL_LM" if causal else None,
        target_modules=_targets(list(names.values()), base, root),
        rank_pattern={re.escape(names[s]): r for s, r in shape.ranks.items() if r != rank},
        alpha_pattern={re.escape(names[s]): a for s, a in shape.alphas.items() if a != alpha},
        base_model_name_or_path=name_of(base),
    )  # fmt: skip
    config.save_pretrained(str(folder))
    written = read_mapping(folder / CONFIG, AdapterError)
    if isinstance(written["target_modules"], list):
        written["target_modules"] = sorted(names.values())  # PEFT keeps a set; equal adapters are equal files
    write_file(folder / CONFIG, json.dumps(written, indent=1, sort_keys=True).encode("utf-8"))
    keys = {slot_key(slot): name for slot, name in names.items()}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, part = key.partition(".")
        first, *rest = [p for p in part.split(".") if p != NAME]
        tensors[".".join((f"{_PREFIX}{keys[layer]}", first, *rest))] = value.detach().cpu().contiguous()
    get_backend("safetensors").write(folder / WEIGHTS, tensors)
    said = {"base": name_of(base), "weight_hash": base.weight_hash(), "adapter_hash": state_hash(state), **identity}
    write_file(folder / BASE, json.dumps(said, indent=1, sort_keys=True).encode("utf-8"))


def name_of(base: ModuleBlock) -> str:
    """What an adapter calls its base: the model's reference, of a path on this machine the last part."""
    reference = str(base.config.get("checkpoint_ref") or base.name)
    return Path(reference).name if Path(reference).is_absolute() else reference


def _targets(names: list[str], base: ModuleBlock, root: str) -> list[str] | str:
    """The names as PEFT finds exactly them: it takes a name in a list for the end of other names too."""
    others = [n.removeprefix(root) for n in base.slot_modules() if n.removeprefix(root) not in names]
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(re.escape(name) for name in names)
    return names


def read_base(folder: Path) -> dict[str, Any]:
    """What an adapter says of its base; empty for one that PEFT wrote. Raises: AdapterError."""
    return read_mapping(folder / BASE, AdapterError) if (folder / BASE).is_file() else {}


def read_adapter(folder: Path, base: ModuleBlock) -> AdapterFile:
    """The adapter in `folder`, for the block `base`, which is loaded.

    Raises: MissingModelError if it is not there; AdapterError for another base, for layers that `base` lacks, and for
    kinds of adapters that are not plain low-rank ones; CheckpointError for an unreadable or changed file.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingModelError(
                f"no adapter in {str(folder)!r}: there is no {name}; train and save one there, or leave the folder out to "
                "begin with an adapter that changes nothing"
            )
    said, here = read_base(folder), base.weight_hash()
    if said.get("weight_hash") not in (None, here):
        raise AdapterError(
            f"the adapter in {str(folder)!r} was learned on {said.get('base')!r} with weights {said['weight_hash']}, but "
            f"block {base.name!r} here has weights {here}; load the base that it belongs to, or train it again"
        )
    config = _checked(folder, read_mapping(folder / CONFIG, AdapterError))
    root, slots = _root(base), base.slot_modules()
    ranks: dict[str, int] = {}
    state: dict[str, Tensor] = {}
    for key, value in read_tensors(folder / WEIGHTS, "safetensors").items():
        name, found, part = key.removeprefix(_PREFIX).rpartition(".lora_")
        slot = f"{root}{name}"
        if not found or slot not in slots:
            raise AdapterError(
                f"the adapter in {str(folder)!r} holds {key!r}, but block {base.name!r} has no layer {name or key!r}; "
                f"{did_you_mean(slot, slots)}"
            )
        first, _, rest = f"lora_{part}".partition(".")
        state[".".join(p for p in (slot_key(slot), first, NAME, rest) if p)] = value
        if first in ("lora_A", "lora_embedding_A"):
            ranks[slot] = value.shape[0]
    if said.get("adapter_hash") not in (None, state_hash(state)):
        raise CheckpointError(f"{folder / WEIGHTS} does not match its hash; it was changed or cut off")
    if not ranks:
        raise AdapterError(f"the adapter in {str(folder)!r} holds no low-rank layers")
    alphas = {slot: _alpha(config, slot.removeprefix(root), rank) for slot, rank in ranks.items()}
    return AdapterFile(Shape(ranks, alphas, float(config.get("lora_dropout") or 0.0)), state, said)


def _alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha with which `alpha / rank` is the factor that the file means (rank-stabilised ones divide by the root)."""
    from peft.utils.other import get_pattern_key

    pattern: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), name)) or config.get("lora_alpha") or 8)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _checked(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("low-rank adapters need PEFT: pip install peft") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA adapters are read")
    usual = cast("dict[str, Any]", LoraConfig().to_dict())
    for key, value in config.items():
        if key not in _KNOWN and value not in (None, False, {}, []) and value != usual.get(key):
            raise AdapterError(
                f"{folder / CONFIG}: {key} is {str(value)[:80]!r}, which is more than a plain low-rank adapter; "
                "merge it into its base with PEFT, or train one without"
            )
    return config

"""Low-rank adapters: small layers that add to what a layer gives, without touching it.

PEFT makes the layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685) and computes with them; the base stays as it is,
its weights, names and files too. Which adapters work is decided in each call.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from wg_core.errors import AdapterError, ConfigError, MissingExtraError, did_you_mean
from wg_core.execution.block import Block
from wg_core.execution.context import current_context
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from torch import nn

NAME = "lora"
WHEN = ("world_id", "stage_id", "pipeline_id", "graph_id", "node_id", "path", "step", "iteration")

# The adapters that the graph which runs now has put on the block that it calls; None outside graphs.
_ACTIVE: ContextVar[frozenset[int] | None] = ContextVar("wg_adapters", default=None)


@contextmanager
def active(adapters: frozenset[int]) -> Generator[None]:
    """Let the adapters with these ids, and no others of any graph, work on the block that is called inside."""
    token = _ACTIVE.set(adapters)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def check_when(when: Mapping[str, Any]) -> None:
    """Raises: ConfigError for a field that a call does not have."""
    for name in when:
        if name not in WHEN:
            raise ConfigError(f"adapter: when.{name} is nothing that a call has; {did_you_mean(name, WHEN)}")


def applies(adapter: object, when: Mapping[str, Any], managed: bool) -> bool:
    """Whether an adapter works in the running call: as its graph says, and where all globs of `when` match."""
    if managed:
        chosen = _ACTIVE.get()
        if chosen is None or id(adapter) not in chosen:
            return False
    if not when:
        return True
    context = current_context()
    return all(fnmatchcase(str(getattr(context, name)), str(glob)) for name, glob in when.items())


def choose_slots(block: Block, globs: list[str], owner: str) -> dict[str, nn.Module]:
    """The layers of `block` whose slot names match. Raises: AdapterError if none does."""
    slots = block.slot_modules() if isinstance(block, ModuleBlock) else {}
    chosen = {name: layer for name, layer in slots.items() if any(fnmatchcase(name, g) for g in globs)}
    if not chosen:
        raise AdapterError(
            f"{owner}: block {block.name!r} has no slot that matches {globs}; {did_you_mean(globs[0] if globs else '', slots)}"
        )
    return chosen


def slot_key(slot: str) -> str:
    """A slot name as a name of a module."""
    return slot.replace(".", "__")


def lora_layers(layers: Mapping[str, nn.Module], *, rank: int, alpha: float, dropout: float) -> dict[str, nn.Module]:
    """An adapter layer for each layer, by `slot_key`; called with what the layer is given, after `feed`.

    Raises: MissingExtraError without PEFT, AdapterError for a kind of layer that PEFT cannot adapt.
    """
    from torch import nn

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("low-rank adapters need PEFT: pip install peft") from error
    holder = nn.ModuleDict({slot_key(name): layer for name, layer in layers.items()})
    learning = {p: p.requires_grad for p in holder.parameters()}
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(holder.keys()))  # type: ignore[arg-type]
    try:
        inject_adapter_in_model(config, holder, adapter_name=NAME)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"PEFT cannot adapt these layers: {error}") from error
    finally:
        for parameter, state in learning.items():
            parameter.requires_grad_(state)
    made: dict[str, nn.Module] = dict(holder.items())
    for adapted in made.values():
        adapted.base_layer = given_output(adapted.base_layer)
    return made


def given_output(layer: Any) -> Any:
    """A module in the place of `layer` that gives an output which is known already, and looks like `layer` otherwise."""
    from torch import nn

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["like"] = layer
            self.__dict__["now"] = threading.local()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__["now"].output

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["like"], name)

    return Given()


def add_to(adapted: Any, args: tuple[Any, ...], output: Any) -> Any:
    """`output` of a layer called with `args`, plus what its adapter layer adds."""
    now = adapted.base_layer.__dict__["now"]
    now.output = output
    try:
        return adapted(*args)
    finally:
        del now.output

"""Low-rank adapters: small layers that add to what a layer gives, without touching it.

PEFT makes the layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685) and computes with them; the base stays as it is,
its weights, names and files too. Which adapters work is decided in each call.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from wg_core.errors import AdapterError, ConfigError, MissingExtraError, did_you_mean
from wg_core.execution.block import Block
from wg_core.execution.context import FRAME, current_context
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from torch import nn

NAME = "lora"
WHEN = ("world_id", "stage_id", "pipeline_id", "graph_id", "node_id", "path", "step", "iteration")

# The adapters that the graph which runs now has put on the block that it calls; None outside graphs.
_ACTIVE: ContextVar[frozenset[int] | None] = ContextVar("wg_adapters", default=None)

# While a batch runs whose rows are different calls: the rows of each adapter, by its id, and how many rows there are.
_ROWS: ContextVar[tuple[Mapping[int, list[int]], int] | None] = ContextVar("wg_adapter_rows", default=None)

LINEAR = "all-linear"  # PEFT's word for all linear and convolution layers but the output layer


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


@dataclass(frozen=True, slots=True)
class Places:
    """The nodes, by full path (`world/stage/.../node`), in whose calls an adapter works, with all that runs below them."""

    paths: frozenset[str]
    below: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, paths: Iterable[str]) -> Places:
        found = frozenset(paths)
        return cls(found, tuple(f"{path}/" for path in sorted(found)))

    def here(self) -> bool:
        """Whether the running call is at one of these places."""
        frame = FRAME.get()
        if frame is None or not self.paths:
            return False
        path = f"{frame.path}/{frame.node_id}"
        return path in self.paths or path.startswith(self.below)


def applies(adapter: object, when: Mapping[str, Any], managed: bool, places: Places | None = None) -> bool:
    """Whether an adapter works in the running call: as its graph or world says, and where all globs of `when` match."""
    if managed:
        chosen = _ACTIVE.get()
        if chosen is None or id(adapter) not in chosen:
            return False
    if places is not None and not places.here():
        return False
    if not when:
        return True
    context = current_context()
    return all(fnmatchcase(str(getattr(context, name)), str(glob)) for name, glob in when.items())


def working_on(block: Block) -> tuple[Any, ...]:
    """The weight adapters that work on `block` in the running call; their `weight_hash()` says what they do to it."""
    found = block.adapters if isinstance(block, ModuleBlock) else ()
    return tuple(adapter for adapter in found if adapter.works())


@contextmanager
def per_row(chosen: Sequence[Collection[object]]) -> Generator[None]:
    """Let row `i` of every batch that runs inside be adapted by `chosen[i]` (what `working_on` gave in its call) alone.

    The first dimension of what adapted layers are given is the batch. As `adapter_names` of PEFT, for whole sets.
    """
    rows: dict[int, list[int]] = {}
    for i, adapters in enumerate(chosen):
        for adapter in adapters:
            rows.setdefault(id(adapter), []).append(i)
    token = _ROWS.set((rows, len(chosen)))
    try:
        yield
    finally:
        _ROWS.reset(token)


def choose_slots(block: Block, globs: list[str], owner: str) -> dict[str, nn.Module]:
    """The layers of `block` whose slot names match, `all-linear` standing for all but embeddings and the output layer.

    Raises: AdapterError if none does.
    """
    slots = block.slot_modules() if isinstance(block, ModuleBlock) else {}
    linear = _linear(block, slots) if LINEAR in globs and isinstance(block, ModuleBlock) else frozenset[str]()
    chosen = {n: layer for n, layer in slots.items() if n in linear or any(fnmatchcase(n, g) for g in globs)}
    if not chosen:
        raise AdapterError(
            f"{owner}: block {block.name!r} has no slot that matches {globs}; {did_you_mean(globs[0] if globs else '', slots)}"
        )
    return chosen


def _linear(block: ModuleBlock, slots: Mapping[str, nn.Module]) -> frozenset[str]:
    """Slots that are no embedding, not tied to one, and not the output layer of a language model."""
    from torch import nn

    tables = {id(layer.weight) for layer in slots.values() if isinstance(layer, nn.Embedding)}
    heads: set[int] = set()
    for module in block.modules.values():
        head = getattr(module, "get_output_embeddings", None)
        heads.add(id(head()) if head is not None else 0)
    return frozenset(
        name
        for name, layer in slots.items()
        if not isinstance(layer, nn.Embedding) and id(layer.weight) not in tables and id(layer) not in heads
    )


def slot_key(slot: str) -> str:
    """A slot name as a name of a module."""
    return slot.replace(".", "__")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a low-rank adapter is beside its numbers: rank and alpha of each slot, and dropout while it learns."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dropout: float = 0.0

    @classmethod
    def even(cls, slots: Iterable[str], rank: int, alpha: float, dropout: float = 0.0) -> Shape:
        """The same rank and alpha for all slots."""
        names = list(slots)
        return cls(dict.fromkeys(names, rank), dict.fromkeys(names, alpha), dropout)


def lora_config(shape: Shape, slots: Iterable[str]) -> Any:
    """PEFT's configuration of an adapter on modules that are named by `slot_key`."""
    from peft import LoraConfig

    names = list(slots)
    rank, alpha = shape.ranks[names[0]], shape.alphas[names[0]]
    return LoraConfig(
        r=rank, lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=shape.dropout, target_modules=[slot_key(n) for n in names],
        rank_pattern={slot_key(n): shape.ranks[n] for n in names if shape.ranks[n] != rank},
        alpha_pattern={slot_key(n): shape.alphas[n] for n in names if shape.alphas[n] != alpha},
    )  # fmt: skip


@contextmanager
def learning_as_before(holder: nn.Module) -> Generator[None]:
    """PEFT turns off the gradients of what it adapts; here they are as they were afterwards."""
    learning = {p: p.requires_grad for p in holder.parameters()}
    try:
        yield
    finally:
        for parameter, state in learning.items():
            parameter.requires_grad_(state)


def lora_layers(layers: Mapping[str, nn.Module], shape: Shape) -> dict[str, nn.Module]:
    """An adapter layer for each layer, by `slot_key`; called with what the layer is given, after `feed`.

    Raises: MissingExtraError without PEFT, AdapterError for a kind of layer that PEFT cannot adapt.
    """
    from torch import nn

    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("low-rank adapters need PEFT: pip install peft") from error
    holder = nn.ModuleDict({slot_key(name): layer for name, layer in layers.items()})
    with learning_as_before(holder):
        try:
            inject_adapter_in_model(lora_config(shape, layers), holder, adapter_name=NAME)
        except (ValueError, TypeError) as error:
            raise AdapterError(f"PEFT cannot adapt these layers: {error}") from error
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


def adapt(adapter: Any, key: str, args: tuple[Any, ...], output: Any) -> Any:
    """`output` of the layer at `key` with what the adapter adds in the rows that are its own; None where it adds nothing."""
    chosen = _ROWS.get()
    mine: list[int] | None = None
    if chosen is None:
        if not adapter.works():
            return None
    else:
        mine = chosen[0].get(id(adapter))
        if mine is None:
            return None
    adapted = adapter.adapted(key)
    if adapted is None:
        return None
    if chosen is None or mine is None or len(mine) == chosen[1]:
        return add_to(adapted, args, output)
    if args[0].shape[0] != chosen[1]:
        raise AdapterError(
            f"adapter {adapter.name!r}: a layer is given {list(args[0].shape)}, which does not begin with the batch of "
            f"{chosen[1]} rows; run these calls one by one"
        )
    import torch

    index = torch.tensor(mine, device=output.device)
    some = add_to(adapted, (args[0].index_select(0, index), *args[1:]), output.index_select(0, index))
    return output.index_copy(0, index, some)

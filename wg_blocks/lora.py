"""Low-rank adaptation of another block: learns a little beside weights that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wg_core import Block, current_context
from wg_core.assembly.roles import WeightAdapter
from wg_core.errors import AdapterError, ConfigError
from wg_core.weights.combine import combine, merge_into
from wg_core.weights.lora import Places, Shape, adapt, applies, check_when, choose_slots, lora_layers, slot_key
from wg_core.weights.module import ModuleBlock
from wg_core.weights.peft_layout import AdapterFile, read_adapter, read_base, write_adapter

if TYPE_CHECKING:
    from torch import nn


class LoRA(ModuleBlock, WeightAdapter):
    """Adds `alpha / rank` * B A to the layers of node `target` whose slot names match a glob of `modules`.

    `all-linear` among `modules` stands for every linear and convolution layer but the output layer of a language model.
    In a graph it works on all uses of the target's block in that graph, and in no other graph. `when` narrows this
    to calls whose context matches (`{"node_id": "painter", "iteration": "0"}`; values are globs). By hand,
    `attach(block)` makes it work in every call. A new one changes nothing until it has learned. `checkpoint_ref` is the
    folder of an adapter in PEFT's layout, which then says rank, alpha and layers itself.

    Raises: ConfigError for a bad rank or an unknown field in `when`; AdapterError where it cannot be attached.
    """

    role = "adapter"
    poolable = False
    ports = ()

    def __init__(
        self,
        *,
        target: str = "",
        modules: Sequence[str] = ("*",),
        rank: int = 4,
        alpha: float | None = None,
        dropout: float = 0.0,
        when: Mapping[str, Any] | None = None,
        init_seed: int = 0,
        checkpoint_ref: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"adapter/lora: rank is a whole number from 1, not {rank!r}")
        if isinstance(modules, str) or not modules:
            raise ConfigError("adapter/lora: modules is a list of globs over slot names, such as ['net.*']")
        check_when(when or {})
        self.target, self.globs, self.rank = target, list(modules), rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout, self.when, self.init_seed = dropout, dict(when or {}), init_seed
        self.checkpoint_ref = checkpoint_ref
        self.places: Places | None = None
        self._managed = False
        self._handles: list[Any] = []
        self._shape: Shape | None = None
        self._file: AdapterFile | None = None

    # ---- attaching -------------------------------------------------------------------------------------------------

    def attach(self, block: Block, *, managed: bool = False, places: Places | None = None) -> None:
        """Hang on to `block`; with `managed` its graph says in which calls, with `places` its world. Loads no weights.

        Raises: AdapterError for a block without local weights, or another one than this adapter has learned for.
        """
        if not isinstance(block, ModuleBlock) or block is self:
            raise AdapterError(
                f"adapter {self.name!r}: target {self.target!r} is {block.name!r}, which has no weights to adapt"
            )
        self._managed, self.places = managed, places
        if block is not self.leans_on:
            self.detach()
            self.leans_on = block
            block.adapters.append(self)
            if block.materialized:
                try:
                    self.hook()
                except AdapterError:
                    self.detach()
                    raise

    def detach(self) -> None:
        """Let go of the block; what was learned is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.leans_on is not None:
            self.leans_on.adapters.remove(self)
            self.leans_on = None

    def hook(self) -> None:
        """Listen to the layers of the target, which has just built them."""
        base = self._base()
        slots = base.slot_modules()
        if self._shape is not None:
            lacking = sorted(set(self._shape.ranks) - set(slots))
            if lacking:
                raise AdapterError(
                    f"adapter {self.name!r} was made for {sorted(self._shape.ranks)}, but block {base.name!r} has {sorted(slots)}"
                )
            chosen = {slot: slots[slot] for slot in self._shape.ranks}
        elif self.checkpoint_ref is not None:
            chosen = slots  # the folder says which, and is read at the first call that this adapter works in
        else:
            chosen = self._choose(base)
        for slot, layer in chosen.items():
            self._handles.append(layer.register_forward_hook(partial(self._adapt, slot_key(slot))))

    def works(self) -> bool:
        """Whether it changes the running call."""
        return applies(self, self.when, self._managed, self.places)

    def _adapt(self, key: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return adapt(self, key, args, output)

    def adapted(self, key: str) -> Any:
        """The layer that adapts the slot with this key, in the mode of the running call; None where there is none."""
        layer = self.modules.get(key)
        if layer is not None and self._shape is not None and self._shape.dropout:
            learning = self.training or current_context().training
            if layer.training is not learning:
                layer.train(learning)
        return layer

    def _base(self) -> ModuleBlock:
        if self.leans_on is None:
            raise AdapterError(
                f"adapter {self.name!r} is attached to nothing; add it to the graph that holds node {self.target!r}"
            )
        return self.leans_on

    # ---- weights -----------------------------------------------------------------------------------------------------

    def build_modules(self) -> Mapping[str, nn.Module]:
        base = self._base()
        slots = base.slot_modules()
        if self._shape is None and self.checkpoint_ref is not None and Path(self.checkpoint_ref).is_dir():
            self._file = read_adapter(Path(self.checkpoint_ref), base)
            self._shape = self._file.shape
        if self._shape is None:
            self._shape = Shape.even(self._choose(base), self.rank, self.alpha, self.dropout)
        layers = {slot: slots[slot] for slot in self._shape.ranks}
        return lora_layers(layers, self._shape) if layers else {}

    def _choose(self, base: ModuleBlock) -> dict[str, nn.Module]:
        """The layers to adapt; one of many adapters of a world may find none in its block, and then does nothing."""
        try:
            return choose_slots(base, self.globs, self.name)
        except AdapterError:
            if self.places is None:
                raise
            return {}

    def read_reference(self, reference: str) -> Mapping[str, Any]:
        """The adapter in a folder, in PEFT's layout. Raises: MissingModelError, AdapterError, CheckpointError."""
        file = self._file or read_adapter(Path(reference), self._base())
        self._file = None
        return file.state

    def weight_hash(self) -> str | None:
        """Hash of what was learned, known before it is loaded; None for an adapter that changes nothing yet."""
        if self.weights_changed():
            return super().weight_hash()
        if self.checkpoint_ref is None or not Path(self.checkpoint_ref).is_dir():
            return None
        return read_base(Path(self.checkpoint_ref)).get("adapter_hash") or super().weight_hash()

    @property
    def shape(self) -> Shape:
        """Rank and alpha of each slot, built if need be."""
        self.materialize()
        assert self._shape is not None
        return self._shape

    def save_adapter(self, folder: Path | str, **identity: Any) -> Path:
        """Write the adapter in PEFT's layout, with the name and weight hash of its base (and `identity`) beside it."""
        target = Path(folder)
        write_adapter(target, self._base(), self.shape, self.own_state_dict(), identity)
        return target

    def load_adapter(self, folder: Path | str) -> None:
        """Take over an adapter that `save_adapter` or PEFT wrote; parameters of equal shape stay the same objects.

        Raises: MissingModelError, AdapterError, CheckpointError; this adapter is then as before.
        """
        base = self._base()
        base.materialize()
        file = read_adapter(Path(folder), base)
        self.take_shape(file.shape)
        self.load_state_dict(file.state)

    def take_shape(self, shape: Shape) -> None:
        """Have this shape; where it is another one, what was learned is forgotten."""
        with self._lock:
            if self._built is not None and self._shape == shape:
                return
            base = self.leans_on
            places, managed = self.places, self._managed
            self.unload()
            self._shape = shape
            if base is not None:
                self.detach()
                self.attach(base, managed=managed, places=places)
                self.build(read_reference=False)

    def combined(self, others: Sequence[LoRA], weights: Sequence[float], **settings: Any) -> LoRA:
        """A new adapter, attached to nothing, that is the weighted sum of this one and `others` (see `combine`)."""
        base = self._base()
        every = (self, *others)
        learned = [(a.shape, a.own_state_dict()) for a in every]
        shape, state = combine(base.slot_modules(), learned, weights, **settings)
        rank = max(shape.ranks.values())
        made = LoRA(target=self.target, modules=sorted(shape.ranks), rank=rank, alpha=float(rank), init_seed=self.init_seed)
        made._shape = shape
        made.attach(base, places=Places.of(()))
        made.load_state_dict(state)
        return made

    def merge_into(self, block: ModuleBlock) -> None:
        """Make what was learned part of the weights of `block`, a copy of the base."""
        merge_into({slot_key(slot): layer for slot, layer in block.slot_modules().items()}, self.modules)

    def slot_modules(self) -> dict[str, nn.Module]:
        return {}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Nothing: it works where its target does."""
        return {}

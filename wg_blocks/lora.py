"""Low-rank adaptation of another node's block: learns a little beside weights that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from wg_core import Block
from wg_core.assembly.roles import WeightAdapter
from wg_core.errors import AdapterError, ConfigError
from wg_core.weights.lora import add_to, applies, check_when, choose_slots, lora_layers, slot_key
from wg_core.weights.module import ModuleBlock

if TYPE_CHECKING:
    from torch import nn


class LoRA(ModuleBlock, WeightAdapter):
    """Adds `alpha / rank` * B A to the layers of node `target` whose slot names match a glob of `modules`.

    In a graph it works on all uses of the target's block in that graph, and in no other graph. `when` narrows this
    to calls whose context matches (`{"node_id": "painter", "iteration": "0"}`; values are globs). By hand,
    `attach(block)` makes it work in every call. A new one changes nothing until it has learned.

    Raises: ConfigError for a bad rank or an unknown field in `when`; AdapterError where it cannot be attached.
    """

    role = "adapter"
    poolable = False
    ports = ()

    def __init__(
        self,
        *,
        target: str,
        modules: Sequence[str] = ("*",),
        rank: int = 4,
        alpha: float | None = None,
        dropout: float = 0.0,
        when: Mapping[str, Any] | None = None,
        init_seed: int = 0,
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
        self._managed = False
        self._handles: list[Any] = []

    # ---- attaching -------------------------------------------------------------------------------------------------

    def attach(self, block: Block, *, managed: bool = False) -> None:
        """Hang on to `block`; with `managed` its graph says in which calls. Loads no weights.

        Raises: AdapterError for a block without local weights, or another one than this adapter has learned for.
        """
        if not isinstance(block, ModuleBlock) or block is self:
            raise AdapterError(
                f"adapter {self.name!r}: target {self.target!r} is {block.name!r}, which has no weights to adapt"
            )
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
        self._managed = managed

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
        layers = choose_slots(base, self.globs, self.name)
        if self._built is not None and {slot_key(slot) for slot in layers} != set(self._built):
            raise AdapterError(
                f"adapter {self.name!r} was made for {sorted(self._built)}, but block {base.name!r} has {sorted(layers)}"
            )
        for slot, layer in layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._adapt, slot_key(slot))))

    def _adapt(self, key: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not applies(self, self.when, self._managed):
            return None
        return add_to(self.modules[key], args, output)

    def _base(self) -> ModuleBlock:
        if self.leans_on is None:
            raise AdapterError(
                f"adapter {self.name!r} is attached to nothing; add it to the graph that holds node {self.target!r}"
            )
        return self.leans_on

    # ---- weights -----------------------------------------------------------------------------------------------------

    def build_modules(self) -> Mapping[str, nn.Module]:
        layers = choose_slots(self._base(), self.globs, self.name)
        return lora_layers(layers, rank=self.rank, alpha=self.alpha, dropout=self.dropout)

    def slot_modules(self) -> dict[str, nn.Module]:
        return {}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Nothing: it works where its target does."""
        return {}

"""ModuleBlock: a block that owns torch modules, and the use of a block with its weights held still."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from wg_core.errors import CheckpointError, MissingModelError, StateDictError
from wg_core.execution.block import Block

if TYPE_CHECKING:
    from torch import Tensor, nn


class ModuleBlock(Block):
    """Base of blocks with torch weights: implement `build_modules` and `forward`, which finds them in `self.modules`.

    Modules are built at first use, with random numbers that follow `init_seed` and touch no global generator. A
    `checkpoint_ref` in the config (a weight file, or a checkpoint of such a block) is read then; building, inspecting
    and dry runs need no file. Modules are owned by composition: the block is no `nn.Module` itself.
    """

    init_seed: int = 0
    fixed: str = ""  # why nothing can be learned through this block's weights; empty where it can

    leans_on: ModuleBlock | None = None  # the block that must be built before this one: what a weight adapter adapts
    adapters: list[Any]  # weight adapters on this block; told by `hook()` when it has built its modules

    _lock: threading.RLock
    _built: dict[str, nn.Module] | None = None
    _ready: bool = False  # built and read: other threads wait for this, the building one works on `_built`
    _frozen: dict[str, bool]
    _place: tuple[Any, Any] = (None, None)
    _stamp: tuple[int, ...] = ()
    _hash: tuple[tuple[int, ...], str] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        block = super().__new__(cls, *args, **kwargs)
        block._lock = threading.RLock()
        block._frozen = {}
        block.adapters = []
        return block

    # ---- building --------------------------------------------------------------------------------------------------

    def build_modules(self) -> Mapping[str, nn.Module]:
        """Make this block's modules by name, with fresh weights; called once, in a forked random state."""
        raise NotImplementedError(f"{type(self).__name__}.build_modules")

    def read_reference(self, reference: str) -> Mapping[str, Any]:
        """The state that a `checkpoint_ref` names. Raises: FileNotFoundError, CheckpointError."""
        from wg_core.weights.checkpoint import read_state

        return read_state(Path(reference))

    def expect_state(self, state: Mapping[str, Any]) -> None:
        """Told of a state that will be loaded, before modules are built for it; for blocks whose form is in their state."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by name, built if need be."""
        if not self._ready:
            self.materialize()
        return cast("dict[str, nn.Module]", self._built)

    @property
    def materialized(self) -> bool:
        return self._ready

    def materialize(self) -> None:
        """Build the modules and read the weights that `checkpoint_ref` names.

        Raises: MissingModelError, CheckpointError, StateDictError; the block is then as before.
        """
        with self._lock:
            if self._built is None:
                self.build()
        super().materialize()

    def build(self, *, read_reference: bool = True) -> None:
        """Build the modules; without `read_reference` weights stay fresh, for a load that replaces them all."""
        import torch

        with self._lock:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.init_seed)
                built = dict(self.build_modules())
            reference = self.config.get("checkpoint_ref") if read_reference else None
            self._built = built
            try:
                if reference is not None:
                    self._read(str(reference))
                if self._place != (None, None):
                    self._move(*self._place)
                for name, parameter in self._own_parameters():
                    if name in self._frozen:
                        parameter.requires_grad_(False)
                self.mode_changed()
                self._stamp = self._versions()
                for adapter in self.adapters:
                    adapter.hook()
                self._ready = True
            except BaseException:
                self._built = None
                raise

    def _read(self, reference: str) -> None:
        try:
            self.load_state_dict(self.read_reference(reference))
        except MissingModelError:
            raise
        except FileNotFoundError:
            raise MissingModelError(
                f"block {self.name!r}: checkpoint_ref {reference!r} is not there (looked in {os.getcwd()}); "
                "put the weight file at that path, or leave checkpoint_ref out to start from fresh weights"
            ) from None
        except StateDictError as error:
            raise CheckpointError(f"checkpoint_ref {reference!r} does not fit block {self.name!r}: {error}") from error

    def unload(self) -> None:
        """Forget modules and weights; the next use builds them again, frozen as they were."""
        with self._lock:
            self._built = None
            self._ready = False

    def close(self) -> None:
        self.unload()

    def fork(self, name: str) -> Self:
        """A block of the same arguments, at the same place and frozen as this one, with weights of its own."""
        made = super().fork(name)
        made._frozen, made._place = dict(self._frozen), self._place
        return made

    # ---- state -------------------------------------------------------------------------------------------------------

    def own_state_dict(self) -> dict[str, Any]:
        return {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, module in self.modules.items():
            prefix = f"{name}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they lie in memory now, tied ones once; 0 before they are loaded."""
        stores = (tensor.untyped_storage() for tensor in self._tensors())
        return sum({store.data_ptr(): store.nbytes() for store in stores}.values())

    def _tensors(self) -> Iterator[Tensor]:
        for module in (self._built or {}).values():
            yield from module.parameters()
            yield from module.buffers()

    def _versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in self._tensors())

    def weights_changed(self) -> bool:
        """Whether the weights were written since they were built: trained, loaded over, or marked so.

        Torch counts writes itself; only writes through `.data` escape it (bump `model_revision` after those).
        """
        return super().weights_changed() or (self._built is not None and self._versions() != self._stamp)

    def written(self) -> set[int]:
        """Where own tensors lie (`data_ptr`) that were written since they were built."""
        pairs = zip(self._tensors(), self._stamp, strict=False)
        return {tensor.data_ptr() for tensor, was in pairs if self.model_revision or tensor._version != was}

    def weight_hash(self) -> str | None:
        """Sha256 of names, kinds and bytes of all own tensors; None while they are not loaded."""
        if self._built is None:
            return None
        versions = self._versions()
        if self._hash is None or self._hash[0] != versions:
            self._hash = (versions, state_hash(self.own_state_dict()))
        return self._hash[1]

    # ---- training ----------------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        yield from self._own_parameters()
        yield from super().named_parameters()

    def may_learn(self) -> bool:
        return self._built is None or any(p.requires_grad for _, p in self._own_parameters())

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.modules.items():
            for key, parameter in module.named_parameters():
                yield f"{name}.{key}", parameter

    def mode_changed(self) -> None:
        for name, module in (self._built or {}).items():
            module.train(self.training)
            if self.training and self._frozen:
                self._rest(name, module)

    def _rest(self, path: str, module: nn.Module) -> None:
        """Put what is wholly frozen into evaluation mode, so that dropout and running statistics rest too."""
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if names and all(name in self._frozen for name in names):
            module.eval()
            return
        for name, child in module.named_children():
            self._rest(f"{path}.{name}", child)

    def hold_parameters(self, prefix: str, globs: Sequence[str] | None, frozen: bool) -> int:
        hits = 0
        for own, parameter in self._own_parameters():
            if globs is not None and not any(fnmatchcase(prefix + own, g) for g in globs):
                continue
            hits += 1
            if frozen and own not in self._frozen:
                self._frozen[own] = parameter.requires_grad
                parameter.requires_grad_(False)
            elif not frozen and own in self._frozen:
                parameter.requires_grad_(self._frozen.pop(own))
        self.mode_changed()
        return hits + super().hold_parameters(prefix, globs, frozen)

    # ---- place and adapters ------------------------------------------------------------------------------------------

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """Move the weights, now or when they are built; `dtype` (a torch dtype or its name) is for float weights."""
        with self._lock:
            old_device, old_dtype = self._place
            self._place = (device if device is not None else old_device, dtype if dtype is not None else old_dtype)
            if self._built is not None:
                before = self.weights_changed()
                self._move(device, dtype)
                if not before:
                    self._stamp = self._versions()
        super().to(device, dtype)
        return self

    def _move(self, device: Any, dtype: Any) -> None:
        import torch

        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for module in (self._built or {}).values():
            module.to(device=device, dtype=kind)

    def adapter_slots(self) -> list[str]:
        """Names of all linear, convolution and embedding layers."""
        return sorted(self.slot_modules())

    def slot_modules(self) -> dict[str, nn.Module]:
        """The layers that accept weight adapters, by slot name."""
        from torch import nn

        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
        return {
            f"{name}.{path}" if path else name: layer
            for name, module in self.modules.items()
            for path, layer in cast("Iterator[tuple[str, nn.Module]]", module.named_modules())
            if isinstance(layer, kinds)
        }


def state_hash(state: Mapping[str, Any]) -> str:
    """Sha256 of the names, kinds and bytes of tensors."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def held_still(block: Block) -> Generator[None]:
    """All weights below `block` held still for this time: modules in evaluation mode, with detached parameters.

    Gradients reach what the block is given, and no parameter of it; weight adapters on it are not its own and go on
    learning.
    """
    owners = [b for b in block.iter_blocks() if isinstance(b, ModuleBlock)]
    modules = (part for owner in owners for module in owner.modules.values() for part in module.modules())
    kept = [(part, name, p) for part in modules for name, p in part._parameters.items() if p is not None]
    training = [owner for owner in owners if owner.training]
    for part, name, parameter in kept:
        part._parameters[name] = cast("nn.Parameter", parameter.detach())
    for owner in training:
        owner.training = False
        owner.mode_changed()
    try:
        yield
    finally:
        for part, name, parameter in kept:
            part._parameters[name] = parameter
        for owner in training:
            owner.training = True
            owner.mode_changed()


def frozen_forward(block: Block, inputs: dict[str, Any]) -> dict[str, Any]:
    """`block.forward` with all weights below it held still: gradients reach the inputs, and no parameter.

    For the use of a block that learns elsewhere (a shared block).
    """
    loaded = sys.modules.get("torch")
    if loaded is not None and not loaded.is_grad_enabled():
        return block.forward(inputs)
    with held_still(block):
        return block.forward(inputs)

"""The doors of every level to training, written once: what learns, in which groups, and by which loss."""

from __future__ import annotations

import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wg_core.assembly.roles import role_of
from wg_core.errors import ConfigError, MissingModelError, NodeError, did_you_mean
from wg_core.execution.block import Block
from wg_core.execution.context import FRAME, Frame, Hook, RunOptions
from wg_core.execution.modes import modes
from wg_core.execution.node import Node
from wg_core.weights.lora import active
from wg_core.weights.module import ModuleBlock, held_still, state_hash
from wg_core.weights.tree import own_parameters, sub_paths, unique

if TYPE_CHECKING:
    from wg_core.execution.validate import ValidationResult
    from wg_core.weights.fit import FitResult, Loss
    from wg_core.weights.training_config import TrainingConfig

_log = logging.getLogger("wg_core.training")


class Trained:
    """A level that can learn: places with a flag each, and below them levels or blocks.

    What learns is decided by all flags on the way to it.
    """

    @abstractmethod
    def places(self) -> Mapping[str, Node[Any]]:
        """The nodes of this level by id; in a world, its stages at their places."""

    @abstractmethod
    def opened(self, node: Node[Any], options: RunOptions, parent: Frame | None) -> Frame:
        """The frame in which this level calls `node`."""

    @abstractmethod
    def options_below(self, node: Node[Any], frame: Frame) -> RunOptions:
        """The options of a level in `node`."""

    @abstractmethod
    def adapters_on(self, node: Node[Any]) -> frozenset[int]:
        """The ids of the weight adapters that work where this level calls `node`."""

    @abstractmethod
    def iter_blocks(self) -> Iterator[Block]:
        """All blocks below, each instance once."""

    @abstractmethod
    def block_paths(self) -> Iterator[tuple[str, Block]]:
        """Each use of a block below, sub-blocks included, as `(path, block)`."""

    @abstractmethod
    def rehearse(self, inputs: Mapping[Any, Any], **options: Any) -> dict[str, Any]:
        """Run as for a loss: outputs and captured values by key, and nothing is kept."""

    @abstractmethod
    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """Check without running."""

    # ---- selection ---------------------------------------------------------------------------------------------------

    def set_trainable(self, path: str, trainable: bool = True, *, freeze_others: bool = False) -> None:
        """Choose what takes part in training: the node at `a/b/c` (or `a.b.c`), or all that a pattern meets.

        A pattern is a glob over such paths (`author/*`), or `role:` and a glob over the roles of blocks
        (`role:backbone`). What is chosen is made trainable on all levels above it. With `freeze_others` all else below
        this level is not.

        Raises: NodeError for an unknown path, and for a pattern that meets nothing.
        """
        chains = self._chosen_nodes(path)
        for chain in chains:
            for node in chain if trainable else chain[-1:]:
                node.trainable = trainable
        if freeze_others:
            self._freeze_but({id(node) for chain in chains for node in chain}, {id(chain[-1]) for chain in chains})

    def _chosen_nodes(self, path: str) -> list[tuple[Node[Any], ...]]:
        """The nodes that `path` means, each with those on the way to it before it."""
        if path.startswith("role:"):
            role = path.removeprefix("role:")
            found = [c for _, c in self._chains() if fnmatchcase(role_of(c[-1].child) or "", role)]
            known = {r for _, c in self._chains() if (r := role_of(c[-1].child)) is not None}
            if not found:
                raise NodeError(f"{_id(self)} has no block of role {role!r}; {did_you_mean(role, known)}")
        elif any(sign in path for sign in "*?["):
            found = [c for p, c in self._chains() if fnmatchcase(p, path)]
            if not found:
                known = [p for p, _ in self._chains()]
                raise NodeError(f"{_id(self)}: no node matches {path!r}; {did_you_mean(path, known)}")
        else:
            found = [tuple(node for _, node in self._way(path.replace(".", "/").split("/")))]
        return found

    def _chains(self) -> Iterator[tuple[str, tuple[Node[Any], ...]]]:
        for name, node in self.places().items():
            yield name, (node,)
            if isinstance(node.child, Trained):
                for path, chain in node.child._chains():
                    yield f"{name}/{path}", (node, *chain)

    def _way(self, names: Sequence[str]) -> Iterator[tuple[Trained, Node[Any]]]:
        """Each level on the way down with the node that it goes through. Raises: NodeError."""
        level: Any = self
        for i, name in enumerate(names):
            if not isinstance(level, Trained):
                raise NodeError(f"{'/'.join([_id(self), *names[:i]])} is a block; there is no node {name!r} below it")
            places = level.places()
            if name not in places:
                raise NodeError(f"{_id(level)} has no node {name!r}; {did_you_mean(name, places)}")
            yield level, places[name]
            level = places[name].child

    def _freeze_but(self, kept: set[int], chosen: set[int]) -> None:
        for node in self.places().values():
            if id(node) not in kept:
                node.trainable = False
            elif id(node) not in chosen and isinstance(node.child, Trained):
                node.child._freeze_but(kept, chosen)

    # ---- parameters --------------------------------------------------------------------------------------------------

    def trained_blocks(self) -> Iterator[tuple[str, Block]]:
        """Each use of a block by a node that learns, with its path; a shared block comes once for each."""
        for name, node in self.places().items():
            if not node.trainable:
                continue
            if isinstance(node.child, Trained):
                for path, block in node.child.trained_blocks():
                    yield f"{name}/{path}", block
            else:
                yield name, cast(Block, node.child)

    def trainable_parameters(self) -> list[Any]:
        """Parameters of all trainable nodes below, each tensor once."""
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def named_trainable_parameters(self) -> Iterator[tuple[str, Any]]:
        """`(path:name, parameter)` of all trainable nodes below, each tensor once."""
        seen: set[int] = set()
        for path, block in self.trained_blocks():
            for name, parameter in block.named_trainable_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}:{name}", parameter

    def parameter_uses(self) -> Iterator[tuple[str, Any]]:
        """`(path:name, parameter)` for each use, and `(block:KEY:name, parameter)` by the block's own key.

        The key of a block is its model reference, else the path of its first use.
        """
        keys: dict[int, str] = {}
        for path, block in self.trained_blocks():
            reference = block.model_ref()
            key = keys.setdefault(id(block), reference[2] if reference else path)
            for name, parameter in block.named_trainable_parameters():
                yield f"{path}:{name}", parameter
                yield f"block:{key}:{name}", parameter

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        """What an optimizer takes: `{name, params, names, lr, weight_decay}` for each group, in stable order.

        Raises: ConfigError for settings that meet no parameter, and for a shared block with different settings by its
        paths; NothingTrainableError.
        """
        from wg_core.weights.training_config import parameter_groups

        return parameter_groups(self.parameter_uses(), config)

    def trained_buffers(self) -> Iterator[tuple[str, Any]]:
        """`(path:name, tensor)` of what blocks that learn keep beside their parameters, such as running means."""
        every = unique(found for top, block in self.trained_blocks() for found in sub_paths(top, block))
        for path, block in every.items():
            if isinstance(block, ModuleBlock):
                for name, module in block.modules.items():
                    yield from ((f"{path}:{name}.{key}", buffer) for key, buffer in module.named_buffers())

    def resting_hashes(self) -> dict[str, str | None]:
        """Hashes of the weights that do not learn, by the first path of their block; loads blocks that it must look into.

        Of a block that learns in part these are its other parameters. None for a model that is not there.
        """
        learning = {id(parameter) for parameter in self.trainable_parameters()}
        moving = {id(part) for _, block in self.trained_blocks() for part in block.iter_blocks()}
        found: dict[str, str | None] = {}
        for path, block in unique(self.block_paths()).items():
            if not isinstance(block, ModuleBlock):
                continue
            if id(block) not in moving:
                found[path] = _hash_of(block)
            elif rest := {name: p for name, p in own_parameters(block) if id(p) not in learning}:
                found[path] = state_hash(rest)
        return found

    def modes_for(self, training: bool) -> AbstractContextManager[None]:
        """All blocks below in the mode of a run, gradients on or off."""
        learn = (part for _, block in self.trained_blocks() for part in block.iter_blocks())
        return modes(self.iter_blocks(), learn if training else None)

    # ---- training ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        examples: Sequence[Any],
        config: TrainingConfig,
        loss: Loss | None = None,
        *,
        held_out: Sequence[Any] = (),
        folder: Path | str | None = None,
        hooks: Sequence[Hook] = (),
    ) -> FitResult:
        """Choose what learns by `config`, and train it on examples; the loss is that of `config.loss` unless given.

        Without a `loss` an example is `{"inputs": {...}, "targets": {...}}`: see `bound_loss`. The rest is that of
        `wg_core.weights.fit.fit`. Raises: what `fit` raises; NodeError for an unknown path in `config.trainable`.
        """
        from wg_core.weights.fit import fit

        for i, path in enumerate(config.trainable):
            self.set_trainable(path, freeze_others=config.freeze_others and i == 0)
        for issue in self.validate(for_training=True).warnings:
            if issue.code == "GRADIENT_BLOCKED":
                _log.warning("%s", issue)
        return fit(
            self.parameter_uses(), examples, loss or bound_loss(self, config), config,
            held_out=held_out, folder=folder, hooks=hooks, buffers=self.trained_buffers(),
            resting=self.resting_hashes() if folder is not None else None,
        )  # fmt: skip


def _hash_of(block: ModuleBlock) -> str | None:
    if block.weight_hash() is None:
        try:
            block.materialize()
        except MissingModelError:
            return None
    return block.weight_hash()


def _id(level: Trained) -> str:
    return str(getattr(level, "id", None) or getattr(level, "world_id", level))


def learning(training: bool = True) -> bool:
    """Whether a loss that is computed now is one to learn from: not where gradients are off, as for held-out examples."""
    torch = sys.modules.get("torch")
    return training and (torch is None or torch.is_grad_enabled())


@contextmanager
def calling(level: Trained, path: str, *, training: bool = True, seed: int | None = None) -> Generator[Block]:
    """The block at `path` of a level, for this time in the very surroundings of a call of it there.

    `path` leads through nodes, and on through sub-blocks. A loss that is computed by hand inside sees the context
    (`current_context()`), the weight adapters and the modes of a real call, and at a place that does not learn the
    block's own weights are held still. Where gradients are off it is a call outside training.

    Raises: NodeError for an unknown path.
    """
    names = path.replace(".", "/").split("/")
    options = RunOptions(training=learning(training), seed=seed)
    frame: Frame | None = None
    at: Any = level
    learns, inner, node = options.training, level, None
    with ExitStack() as around:
        around.enter_context(level.modes_for(options.training))
        while names:
            inside = at if isinstance(at, Trained) else getattr(at, "level", None)
            if isinstance(inside, Trained):
                inner = inside
                (_, node), *_ = inner._way(names[:1])
                frame = inner.opened(node, options, frame)
                learns = frame.options.training and node.trainable
                options = inner.options_below(node, frame)
                at = node.child
            else:
                parts = cast(Block, at).get_sub_blocks()
                if names[0] not in parts:
                    raise NodeError(f"{_id(level)}: nothing at {path!r}: no part {names[0]!r}; {did_you_mean(names[0], parts)}")
                at = parts[names[0]]
            names = names[1:]
        if not isinstance(at, Block) or node is None:
            raise NodeError(f"{_id(level)}: {path!r} is no block; go on to one of {', '.join(cast(Trained, at).places())}")
        token = FRAME.set(frame)
        around.callback(FRAME.reset, token)
        around.enter_context(active(inner.adapters_on(node)))
        if learning(training) and not learns:
            around.enter_context(held_still(at))
        yield at


def bound_loss(level: Trained, config: TrainingConfig) -> Callable[[Sequence[Mapping[str, Any]]], Any]:
    """The loss that `config.loss` describes, for `fit`: the mean over the examples of a batch.

    An example is `{"inputs": {...}, "targets": {...}}`: what the level is run with (in a world `{stage: inputs}`), and
    what the values are compared with, by the names in the bindings. Values are outputs of the level, or ports of nodes
    below it. Every run has a seed of its own, and stops at the first value that is not finite, naming its port.

    Raises: ConfigError for a config without a loss.
    """
    bindings = config.loss
    if not bindings:
        raise ConfigError("the training config has no loss; bind one: loss: [{output: KEY, target: NAME}], or give a loss")
    capture = [b.capture for b in bindings if b.capture is not None]

    def loss(batch: Sequence[Mapping[str, Any]]) -> Any:
        import torch

        losses: list[Any] = []
        for example in batch:
            if not isinstance(cast(Any, example), Mapping) or "inputs" not in example:
                raise ConfigError('an example for a bound loss is {"inputs": {...}, "targets": {...}}; give a loss to learn from others')
            seed = int(torch.randint(2**62, ()))
            values = level.rehearse(
                example["inputs"], training=learning(), seed=seed, guard_nan=True, capture=capture
            )
            for binding in bindings:
                key = binding.output or binding.capture
                if key not in values:
                    raise ConfigError(f"loss: {_id(level)} gave no {key!r}; {did_you_mean(str(key), map(str, values))}")
                losses.append(binding.weight * binding.measure(values[key], example.get("targets", {})))
        return torch.stack(losses).sum() / len(batch)

    return loss


__all__ = ["Trained", "bound_loss", "calling", "learning"]

"""The doors of every level to its state and its children, written once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

from wg_core.assembly.contract import contract_hash
from wg_core.assembly.roles import WeightAdapter
from wg_core.errors import NodeError, StateDictError
from wg_core.execution.block import Block, LoadReport, take_over
from wg_core.execution.context import FRAME, Frame, RunOptions
from wg_core.execution.drive import Held, held
from wg_core.execution.executable_graph import ExecutableGraph
from wg_core.execution.node import Child, Node
from wg_core.levels.holders import hold, holders_of
from wg_core.levels.training import Trained
from wg_core.levels.written import Written
from wg_core.weights.lora import active
from wg_core.weights.module import ModuleBlock, frozen_forward
from wg_core.weights.profiling import Asked, profiled
from wg_core.weights.tree import sub_paths, unique

if TYPE_CHECKING:
    from wg_core.levels.remote import Remote


class Level(ExecutableGraph[Child], Trained, Written):
    """An executable graph that can be written down, loaded and trained."""

    def contract_hash(self) -> str:
        """Hash of the external ports: what may stand in for this level has the same."""
        return contract_hash(self)

    def remotes(self) -> Iterator[Remote]:
        """The parts of this level, at any depth, that run elsewhere."""
        return iter(())

    def run(self, inputs: Mapping[Any, Any] | None = None, *, profile: Asked = None, **options: Any) -> dict[str, Any]:
        """As `ExecutableGraph.run`; with `profile` it is profiled too, as `wg_core.weights.profiling.profiled` says.

        Raises: what that `run` and `profiled` raise.
        """
        if not profile:
            return super().run(inputs, **options)
        with profiled(profile, self.id, options) as chosen:
            return super().run(inputs, **chosen)

    _adapted = False  # whether a weight adapter was ever added

    # ---- state and training ----------------------------------------------------------------------------------------

    def call_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What runs a child; in training, a child that is not trainable here runs with its weights held still."""
        child = cast("Block | Level[Any]", node.child)
        if isinstance(child, Level):
            return self._level_call(node, child)
        if any(isinstance(b, ModuleBlock) for b in child.iter_blocks()):
            return _module_call(cast(Any, node), self._adapters_of(child))
        return child.forward

    def _level_call(self, node: Node[Child], child: Level[Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def call(inputs: dict[str, Any]) -> dict[str, Any]:
            frame = FRAME.get()
            return child._execute(inputs, self.options_below(node, frame), frame) if frame else child.run(inputs)

        return call

    def options_below(self, node: Node[Child], frame: Frame) -> RunOptions:
        """The options of a level in `node`; what is not trainable here runs as outside training."""
        options = super().options_below(node, frame)
        return replace(options, training=False) if options.training and not node.trainable else options

    def stream_of(self, node: Node[Child]) -> Callable[[dict[str, Any]], Generator[dict[str, Any], None, dict[str, Any]]]:
        """What gives the pieces of a block's outputs, with the adapters that work on it here."""
        block = cast(Block, node.child)
        adapters = self._adapters_of(block)
        if not adapters:
            return block.stream_forward
        return lambda inputs: held(block.stream_forward(inputs), lambda: active(adapters))

    def batch_of(self, node: Node[Child]) -> tuple[Block, Callable[[dict[str, Any]], Generator[Any, Any, dict[str, Any]]]]:
        block, requests = super().batch_of(node)
        adapters = self._adapters_of(block)
        if not adapters:
            return block, requests
        return block, lambda inputs: held(requests(inputs), lambda: active(adapters))

    def _adapters_of(self, child: Any) -> frozenset[int]:
        return frozenset(id(a) for a, t in self._hanging() if t is child)

    def insert_node(self, child: Child, node_id: str, **more: Any) -> str:
        """Add a ready child under `node_id`; a weight adapter hangs on to its target as soon as both are there.

        Raises: NodeError for a taken id or a default of an unknown port, ConfigError, AdapterError.
        """
        version = self.version
        super().insert_node(child, node_id, **more)
        self._adapted = self._adapted or isinstance(child, WeightAdapter)
        try:
            self._attach()
        except BaseException:
            super().remove_node(node_id)
            self.version = version
            raise
        hold(self, child)
        return node_id

    def remove_node(self, node_id: str) -> None:
        """Remove a node with its edges and exposed ports; adapters let go of it."""
        child = self.get_node(node_id).child
        super().remove_node(node_id)
        if isinstance(child, WeightAdapter) and not holders_of(child):
            child.detach()
        self._attach()

    def replace_block(self, node_id: str, child: Child) -> None:
        """Put another child with the same ports into a node; adapters move on to it.

        Raises: NodeError if a port that is in use is missing or of another direction or type, AdapterError.
        """
        super().replace_block(node_id, child)
        hold(self, child)
        self._attach()

    def rename_node(self, node_id: str, new_id: str) -> None:
        """Give a node another id; edges, exposed ports and place in the order stay.

        Raises: NodeError for a taken id, and for the target of an adapter, which is part of its configuration.
        """
        for name, node in self.nodes.items() if self._adapted else ():
            if isinstance(node.child, WeightAdapter) and node.child.target == node_id:
                raise NodeError(f"{self.id}/{node_id} is the target of adapter {name!r}; remove that node to rename this one")
        super().rename_node(node_id, new_id)

    def copy(self) -> Self:
        """The same structure over the same blocks, free to change by itself; the levels below are copied too."""
        made = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (dict, list)):
                setattr(made, name, _apart(cast("dict[Any, Any] | list[Any]", value)))
        for node_id, node in self.nodes.items():
            below: Any = node.child
            child: Any = cast("Level[Any]", below).copy() if isinstance(below, Level) else below
            made.nodes[node_id] = replace(node, child=child, hints=dict(node.hints), links=list(node.links))
            hold(made, child)
        made._plan = made._external = made._valid_stamp = None
        return made

    def _hanging(self) -> Iterator[tuple[WeightAdapter, Any]]:
        """Each weight adapter here with the block of its target, or None."""
        for node in self.nodes.values() if self._adapted else ():
            if isinstance(node.child, WeightAdapter):
                target = self.nodes.get(node.child.target)
                yield node.child, target.child if target is not None else None

    def _attach(self) -> None:
        for adapter, target in self._hanging():
            if target is None:
                adapter.detach()
            else:
                adapter.attach(target, managed=True)

    def block_paths(self) -> Iterator[tuple[str, Block]]:
        for node_id, node in self.nodes.items():
            child = cast("Block | Level[Any]", node.child)
            if isinstance(child, Level):
                for path, block in child.block_paths():
                    yield f"{node_id}/{path}", block
            else:
                yield from sub_paths(node_id, child)

    def keyed_blocks(self) -> dict[str, Block]:
        """Each block below once, sub-blocks included, under the path of its first use."""
        return unique(self.block_paths())

    def state_dict(self) -> dict[str, Any]:
        """State of all unique blocks below, as `"<path of first use>:<key>" -> tensor or JSON value`."""
        return {
            f"{path}:{k}": v for path, block in self.keyed_blocks().items() for k, v in block.own_state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Load what `state_dict` gave; nothing changes if it raises.

        Raises: StateDictError for missing or unexpected keys (with `strict`) and wrong shapes.
        """
        current = self.state_dict()
        missing = tuple(k for k in current if k not in state)
        unexpected = tuple(k for k in state if k not in current)
        wrong = [
            k for k in current if k in state and getattr(current[k], "shape", None) != getattr(state[k], "shape", None)
        ]
        if wrong or (strict and (missing or unexpected)):
            raise StateDictError(
                f"{self.id} cannot load this state: missing {list(missing)}, unexpected {list(unexpected)}, wrong shape {wrong}"
            )
        owned = [(path, block, block.own_state_dict()) for path, block in self.keyed_blocks().items()]
        take_over([(block, {k: state.get(f"{path}:{k}", v) for k, v in own.items()}) for path, block, own in owned if own])
        return LoadReport(missing, unexpected)

    # ---- training ----------------------------------------------------------------------------------------------------

    def places(self) -> Mapping[str, Node[Child]]:
        return self.nodes

    def opened(self, node: Node[Child], options: RunOptions, parent: Frame | None) -> Frame:
        frame = Frame(self.level, self.id, options, parent, tuple(self.hooks))
        frame.node_id = node.node_id
        return frame

    def adapters_on(self, node: Node[Child]) -> frozenset[int]:
        return self._adapters_of(node.child)

    def rehearse(self, inputs: Mapping[Any, Any], **options: Any) -> dict[str, Any]:
        return self.run(inputs, **options)


def _apart(value: dict[Any, Any] | list[Any]) -> dict[Any, Any] | list[Any]:
    """A copy down to the second level, in which nothing but values is shared."""
    if isinstance(value, list):
        return list(value)
    return {k: copy.copy(cast(Any, v)) if isinstance(v, (dict, list)) else v for k, v in value.items()}


def _module_call(node: Node[Block], adapters: frozenset[int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    block = node.child

    def call(inputs: dict[str, Any]) -> dict[str, Any]:
        frame = FRAME.get()
        if node.trainable and (frame is None or frame.options.training):
            return block.forward(inputs)
        return frozen_forward(block, inputs)

    def adapted_call(inputs: dict[str, Any]) -> Any:
        with active(adapters):
            outputs: Any = call(inputs)
        return Held(outputs, lambda: active(adapters)) if inspect.iscoroutine(outputs) else outputs

    return adapted_call if adapters else call

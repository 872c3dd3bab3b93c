"""A kit for authors of blocks: `check_block_contract(MyBlock(...))` finds where a block breaks the rules."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wg_blocks.toy import ToyBackbone
from wg_core import Block, BlockRegistry, Graph, Port, WorldContent
from wg_core.assembly.registry import default_registry
from wg_core.assembly.roles import WeightAdapter, role_issues
from wg_core.errors import MissingInputError, StateDictError, UnexpectedInputError
from wg_core.structure.port import UNSET, kind_of

SEED = 7
_SUB = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PREFERRED = ("text", "number", "image", "dict", "list", "tensor")


class ContractError(AssertionError):
    """A block breaks its contract; the message says where and how to mend it."""


def check_block_contract(
    block: Block, inputs: Mapping[str, Any] | None = None, *, registry: BlockRegistry | None = None
) -> None:
    """Check that `block` keeps the contract of all blocks.

    Ports are declared well and stay; config comes back equal and rebuilds the block through `registry` (default: the
    process-wide one); the block runs by itself and in a graph, gives declared outputs of the declared kinds only,
    changes no input, and gives equal outputs for equal seeds; its state survives a checkpoint and a wrong state is
    refused; modes switch and it closes, twice. Without `inputs` values are made up from the types of required inputs
    (of all inputs, where none is required). Copies are run, so a session in `block` is not touched; weight adapters are
    tried on a `backbone/toy`.

    Raises: ContractError, and whatever the block itself raises.
    """
    _check_ports(block)
    rebuild = _check_config(block, registry or default_registry())
    if isinstance(block, WeightAdapter):
        rebuild = _attached(rebuild)
    given = dict(inputs) if inputs is not None else sample_inputs(block)
    if block.output_ports:
        _check_runs(rebuild, given)
    _check_state(rebuild)
    _check_life(rebuild)


def sample_inputs(block: Block) -> dict[str, Any]:
    """Made-up values for the required inputs of a block, or for all where none is required."""
    ports = [p for p in block.input_ports if p.required] or list(block.input_ports)
    return {p.name: sample_value(p) for p in ports if p.name not in ("loop_index", "loop_total")}


def sample_value(port: Port) -> Any:
    """A made-up value that fits a port: from its schema where that names one, else by type."""
    schema = port.schema if isinstance(port.schema, Mapping) else {}
    if port.default is not UNSET:
        return copy.deepcopy(port.default)
    for key in ("default", "const"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = next((t for t in _PREFERRED if t in port.types), port.types[0])
    if kind == "number" and "minimum" in schema:
        return schema["minimum"]
    return _SAMPLES.get(kind, _SAMPLES["any"])()


def _ramp(*shape: int) -> Any:
    import torch

    return torch.linspace(0, 1, steps=torch.Size(shape).numel()).reshape(shape)


_SAMPLES: dict[str, Callable[[], Any]] = {
    "any": lambda: "a small text",
    "text": lambda: "a small text",
    "number": lambda: 1,
    "list": lambda: ["one", "two"],
    "dict": lambda: {"key": "value"},
    "tensor": lambda: _ramp(1, 4, 8, 8),
    "image": lambda: _ramp(1, 3, 16, 16),
    "video": lambda: _ramp(1, 2, 3, 8, 8),
    "audio": lambda: {"waveform": _ramp(1, 160), "sample_rate": 16000},
    "bytes": lambda: b"bytes",
    "ref": lambda: "artifact:sample",
    "link": lambda: {"target_kind": "world", "target_id": "sample"},
    "world": lambda: WorldContent.from_seed({}).view(),
}


# ---- the checks ----------------------------------------------------------------------------------------------------------


def _need(holds: bool, block: Block, message: str) -> None:
    if not holds:
        raise ContractError(f"block {block.name!r} ({type(block).__name__}): {message}")


def _check_ports(block: Block) -> None:
    ports = (*block.input_ports, *block.output_ports)
    _need(len({p.name for p in ports}) == len(ports), block, "a port name occurs twice")
    _need(
        type(block).forward is not Block.forward
        or type(block).stream_forward is not Block.stream_forward
        or not block.output_ports,
        block,
        "it has outputs but no forward; implement forward(self, inputs) -> dict, or stream_forward",
    )
    _need(block.port_index is block.port_index, block, "its ports change from look to look; set `ports` once")
    _need(not role_issues(block), block, "; ".join(role_issues(block)))
    if block.agentic:
        names = {p.name: p for p in ports}
        for name, direction in (("tool_results", "in"), ("tool_calls", "out")):
            port = names.get(name)
            good = port is not None and port.direction == direction and port.optional
            _need(good, block, f"it is agentic, so it needs an optional {direction}put {name!r}")
    for name, sub in block.get_sub_blocks().items():
        _need(_SUB.fullmatch(name) is not None, block, f"sub-block name {name!r} is no plain name")
        _need(isinstance(sub, Block), block, f"sub-block {name!r} is a {type(sub).__name__}, not a Block")


def _check_config(block: Block, registry: BlockRegistry) -> Callable[[], Block]:
    config = block.config
    _need(config == block.config, block, "its config differs from look to look")
    config["_changed"] = True
    _need("_changed" not in block.config, block, "config hands out its own dict; return a copy")
    if block.block_type is not None and block.block_type in registry:
        written = block.to_config()
        rebuilt = registry.build(written)
        _need(rebuilt.to_config() == written, block, f"rebuilt from {written} it says {rebuilt.to_config()}")
        _check_same_ports(block, rebuilt)
        return lambda: registry.build(written)

    def rebuild() -> Block:
        cls: Any = type(block)
        arguments = block.config
        try:
            return cls(**arguments)
        except TypeError:
            return cls(config=arguments)

    rebuilt = rebuild()
    _need(rebuilt.config == block.config, block, f"rebuilt from {block.config} it says {rebuilt.config}")
    _check_same_ports(block, rebuilt)
    return rebuild


def _attached(rebuild: Callable[[], Block]) -> Callable[[], Block]:
    def rebuild_attached() -> Block:
        adapter = rebuild()
        if isinstance(adapter, WeightAdapter):
            adapter.attach(ToyBackbone())
        return adapter

    return rebuild_attached


def _check_same_ports(block: Block, rebuilt: Block) -> None:
    _need(
        (rebuilt.input_ports, rebuilt.output_ports) == (block.input_ports, block.output_ports),
        block,
        "equal config gives other ports; ports may depend on config only",
    )


def _check_runs(rebuild: Callable[[], Block], given: Mapping[str, Any]) -> None:
    alone = rebuild()
    before, handed = _copied(given), dict(given)
    alone.run(handed, strict_types=True)
    for name, value in given.items():
        _need(same(value, before[name]), alone, f"it changed its input {name!r}; work on a copy")
    ports = (alone.input_ports, alone.output_ports)
    _need(ports == (rebuild().input_ports, rebuild().output_ports), alone, "its ports changed by running")
    _check_missing(rebuild, given)
    first, second = (_in_graph(rebuild(), given) for _ in range(2))
    _need(first.keys() == second.keys(), alone, "equal seeds gave other outputs; draw random numbers from node_seed()")
    for name, value in first.items():
        _need(
            same(value, second[name]),
            alone,
            f"equal inputs and seeds gave another {name!r}; draw random numbers from current_context().node_seed()",
        )


def _check_missing(rebuild: Callable[[], Block], given: Mapping[str, Any]) -> None:
    block = rebuild()
    required = {p.name for p in block.input_ports if p.required}
    for name in required:
        try:
            block.run({k: v for k, v in given.items() if k != name})
        except MissingInputError:
            continue
        raise ContractError(f"block {block.name!r}: it ran without its required input {name!r}")
    try:
        block.run({**given, "no_such_input": 1})
    except UnexpectedInputError:
        pass
    else:
        raise ContractError(f"block {block.name!r}: it took an undeclared input")
    try:
        rebuild().run({k: v for k, v in given.items() if k in required}, strict_types=True)
    except MissingInputError:
        _need(not required, block, "it asks for an input that its ports call optional")  # "one of these" is a fair wish


def _in_graph(block: Block, given: Mapping[str, Any]) -> dict[str, Any]:
    graph = Graph("contract")
    graph.add_node(block, "block")
    for port in (*block.input_ports, *block.output_ports):
        expose = graph.expose_input if port.direction == "in" else graph.expose_output
        expose("block", port.name, port.name)
    return graph.run(_copied(given), seed=SEED)


def _check_state(rebuild: Callable[[], Block]) -> None:
    block, other = rebuild(), rebuild()
    state = block.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        block.save_checkpoint(path)
        other.load_from_checkpoint(path)
        _need(same(other.state_dict(), state), block, "its state came back changed from a checkpoint")
    before = _copied(other.state_dict())
    wrong = [{**state, "no_such_key": 1}]
    if state:
        wrong.append(dict(list(state.items())[1:]))
    for each in wrong:
        try:
            other.load_state_dict(each)
        except StateDictError:
            _need(same(other.state_dict(), before), block, "a refused state changed it all the same")
        else:
            raise ContractError(f"block {block.name!r}: it loaded a state with missing or unknown keys")


def _check_life(rebuild: Callable[[], Block]) -> None:
    block = rebuild()
    for mode in (True, False):
        block.train(mode)
        _need(
            all(b.training is mode for b in block.iter_blocks()), block, f"train({mode}) does not reach all sub-blocks"
        )
    learning = [name for name, _ in block.named_trainable_parameters()]
    block.freeze()
    _need(not block.trainable_parameters(), block, "freeze() leaves parameters that learn")
    block.unfreeze()
    again = [name for name, _ in block.named_trainable_parameters()]
    _need(again == learning, block, "unfreeze() does not bring back what freeze() changed")
    block.close()
    block.close()


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal all the way down; arrays by type, shape and every bit, NaN equal to itself."""
    if hasattr(a, "dtype") and hasattr(a, "shape"):
        if kind_of(a) != kind_of(b):
            return False
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _copied(value: Any) -> Any:
    """A deep copy of plain data and arrays; live objects (a view of a world) stay themselves."""
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(v) for v in value)
    if hasattr(value, "detach"):
        return value.detach().clone()
    return value.copy() if hasattr(value, "dtype") and hasattr(value, "copy") else value

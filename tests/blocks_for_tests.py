"""Small real blocks that the tests build their graphs from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wg_core import Block, BlockRegistry, Graph, Port, current_context


class Affine(Block):
    """`y = scale * x + offset`."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"))

    def __init__(self, *, scale: float = 1, offset: float = 0) -> None:
        super().__init__()
        self.scale = scale
        self.offset = offset

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.scale * inputs["x"] + self.offset}


class Const(Block):
    """A value from the configuration."""

    ports = (Port("y", "out"),)

    def __init__(self, *, value: Any = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.value}


class Add(Block):
    """`y = a + b`, `b` has a default."""

    ports = (Port("a", "in", "number"), Port("b", "in", "number", default=10), Port("y", "out", "number"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["a"] + inputs["b"]}


class Join(Block):
    """Hands on what its aggregating input `x` was given."""

    def __init__(self, *, how: str = "concat", types: str = "any", optional: bool = False) -> None:
        self.ports = (
            Port("x", "in", types, optional=optional, aggregation=how),  # type: ignore[arg-type]
            Port("y", "out"),
        )
        super().__init__()

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs.get("x", "nothing")}


class Echo(Block):
    """`y = x`, whatever it is."""

    ports = (Port("x", "in", "any"), Port("y", "out", "any"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"]}


class Saw(Block):
    """Tells what it was given."""

    ports = (
        Port("x", "in", "any", optional=True),
        Port("other", "in", "any", optional=True),
        Port("with_default", "in", "list", default=[]),
        Port("y", "out", "dict"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": dict(inputs)}


class Maybe(Block):
    """Sets its optional output only for numbers that are not negative."""

    ports = (
        Port("x", "in", "number"),
        Port("y", "out", "number", optional=True),
        Port("sign", "out", "text"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        x = inputs["x"]
        return {"y": x, "sign": "+"} if x >= 0 else {"sign": "-"}


class Returns(Block):
    """Declares `y`, and returns what it was told to return."""

    ports = (Port("x", "in", optional=True), Port("y", "out"))

    def __init__(self, *, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.returned


class Fails(Block):
    """Fails, always or from the given iteration on."""

    ports = (Port("x", "in", optional=True), Port("y", "out"))

    def __init__(self, *, at: int = 0, message: str = "out of ink") -> None:
        super().__init__()
        self.at = at
        self.message = message

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if (current_context().iteration or 0) >= self.at:
            raise ValueError(self.message)
        return {"y": inputs.get("x")}


class LoopInfo(Block):
    """`x` with what the loop told: gives a list that grows by `[loop_index, loop_total]`."""

    ports = (
        Port("x", "in", "list"),
        Port("loop_index", "in", "number", optional=True),
        Port("loop_total", "in", "number", optional=True),
        Port("y", "out", "list"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": [*inputs["x"], [inputs.get("loop_index"), inputs.get("loop_total")]]}


class TwoStep(LoopInfo):
    """A solver that needs `2 * steps - 1` iterations."""

    def iterations(self, steps: int) -> int:
        return 2 * steps - 1


class OwnSteps(LoopInfo):
    """A solver whose own configuration names its steps."""

    def __init__(self, *, num_steps: int = 4) -> None:
        super().__init__()
        self.num_steps = num_steps

    def iterations(self, steps: int) -> int:
        return steps


class Initial(Block):
    """Begins a loop with a list that holds the number of its steps."""

    ports = (Port("loop_total", "in", "number", optional=True), Port("y", "out", "list"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": [inputs.get("loop_total")]}


class Reached(Block):
    """Whether `x` has reached `limit`; hands `x` on."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"), Port("done", "out", "any"))

    def __init__(self, *, limit: float = 10) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"], "done": inputs["x"] >= self.limit}


class Calls(Block):
    """Echo that counts its calls and keeps what `probe` gives at each."""

    ports = (Port("x", "in", "any"), Port("y", "out", "any"))

    def __init__(self, probe: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.probe = probe
        self.calls = 0
        self.seen: list[Any] = []

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        if self.probe is not None:
            self.seen.append(self.probe())
        return {"y": inputs["x"]}


class Thing:
    """Something that a weak reference can watch."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class MakesThing(Block):
    """Makes a new thing at each call and hands a weak reference to `watch`."""

    ports = (Port("x", "in", "any", optional=True), Port("y", "out", "any"))

    def __init__(self, watch: Callable[[Thing], None]) -> None:
        super().__init__()
        self.watch = watch

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        thing = Thing()
        self.watch(thing)
        return {"y": thing}


class Reduces(Block):
    """Turns anything into a number, keeping nothing of it."""

    ports = (Port("x", "in", "any"), Port("y", "out", "number"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": 1}


class Where(Block):
    """Tells where it runs: the call context as a mapping."""

    ports = (Port("x", "in", "any", optional=True), Port("y", "out", "list"))

    def __init__(self) -> None:
        super().__init__()

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        context = current_context()
        here = {
            "path": context.path,
            "graph_id": context.graph_id,
            "pipeline_id": context.pipeline_id,
            "node_id": context.node_id,
            "iteration": context.iteration,
            "seed": context.seed,
            "node_seed": context.node_seed(),
            "training": context.training,
            "step": context.step,
        }
        return {"y": [*(inputs.get("x") or []), here]}


class Talks(Block):
    """Sends an event and counts use."""

    ports = (Port("x", "in", "any"), Port("y", "out", "any"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        context = current_context()
        context.add_usage("tiny", prompt_tokens=3, completion_tokens=2)
        context.emit("progress", text="half way")
        return {"y": inputs["x"]}


class Sleeps(Block):
    """Takes `seconds`."""

    ports = (Port("x", "in", "any", optional=True), Port("y", "out", "any"))

    def __init__(self, *, seconds: float = 0.05) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {"y": inputs.get("x")}


class Modes(Block):
    """Tells whether it is in training mode, and whether torch keeps gradients."""

    ports = (Port("x", "in", "any", optional=True), Port("y", "out", "dict"))

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[bool] = []

    def mode_changed(self) -> None:
        self.changes.append(self.training)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        return {"y": {"training": self.training, "grad": torch.is_grad_enabled()}}


class Weights(Block):
    """One matrix: `y = x @ w`; keeps state, can be trained and shared through the pool."""

    ports = (Port("x", "in", "tensor"), Port("y", "out", "tensor"))

    def __init__(self, *, checkpoint_ref: str | None = None, size: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        import torch

        self.weight = torch.nn.Parameter(torch.eye(size) * scale)
        self.steps = 0
        self.closed = False

    def own_state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight.detach(), "steps": self.steps}

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight.data.copy_(state["weight"])
        self.steps = state["steps"]

    def named_parameters(self) -> Any:
        yield "weight", self.weight

    def close(self) -> None:
        self.closed = True

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] @ self.weight}


class Model(Block):
    """A block with a model's identity, slow to build."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"))
    call_time_keys = frozenset({"temperature"})

    def __init__(
        self,
        *,
        checkpoint_ref: str | None = None,
        model_id: str | None = None,
        provider: str | None = None,
        endpoint_url: str | None = None,
        width: int = 1,
        temperature: float = 1.0,
        seconds: float = 0.0,
    ) -> None:
        super().__init__()
        time.sleep(seconds)
        self.width = width
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * self.width}


class Session(Model):
    """A block with a model's identity that keeps a conversation: never shared."""

    poolable = False


class Agent(Block):
    """Owns a sub-block built through the same registry and pool."""

    ports = (Port("x", "in", "number"), Port("y", "out", "number"))
    poolable = False

    def __init__(self, *, llm: dict[str, Any], build: Callable[[Mapping[str, Any]], Block]) -> None:
        super().__init__()
        self.llm = build(llm)

    def get_sub_blocks(self) -> dict[str, Block]:
        return {"llm": self.llm}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.llm.forward(inputs)


class Typed(Block):
    """Ports of any types, for wiring."""

    def __init__(
        self,
        *,
        takes: str = "any",
        gives: str = "any",
        optional: bool = False,
        how: str = "single",
        tag_in: str | None = None,
        tag_out: str | None = None,
    ) -> None:
        self.ports = (
            Port("x", "in", takes, optional=optional, aggregation=how, tag=tag_in),  # type: ignore[arg-type]
            Port("y", "out", gives, tag=tag_out),
        )
        super().__init__()

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs.get("x")}


class Barrier(Block):
    """Waits until as many threads are inside as `parties` says, so that runs really overlap."""

    ports = (Port("x", "in", "any"), Port("y", "out", "any"))

    def __init__(self, parties: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(parties)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.barrier.wait(timeout=10)
        return {"y": inputs["x"]}


TYPES: dict[str, type[Block]] = {
    "test/affine": Affine,
    "test/const": Const,
    "test/add": Add,
    "test/join": Join,
    "test/echo": Echo,
    "test/saw": Saw,
    "test/maybe": Maybe,
    "test/returns": Returns,
    "test/fails": Fails,
    "test/loop_info": LoopInfo,
    "test/two_step": TwoStep,
    "test/own_steps": OwnSteps,
    "test/initial": Initial,
    "test/reached": Reached,
    "test/where": Where,
    "test/weights": Weights,
    "test/model": Model,
    "test/session": Session,
    "test/agent": Agent,
    "test/typed": Typed,
}


def new_registry() -> BlockRegistry:
    """A registry of its own with all test blocks that a configuration can build."""
    registry = BlockRegistry()
    for block_type, cls in TYPES.items():
        registry.register(block_type, cls)
    return registry


def chain(*blocks: Block, id: str = "chain") -> Graph:
    """Blocks with ports `x` and `y` in a row, as `n0`, `n1`, ...; exposed as `x` and `y`."""
    graph = Graph(id)
    for i, block in enumerate(blocks):
        graph.add_node(block, f"n{i}")
        if i:
            graph.add_edge(f"n{i - 1}", "y", f"n{i}", "x")
    if "x" in blocks[0].port_index.inputs:
        graph.expose_input("n0", "x", "x")
    graph.expose_output(f"n{len(blocks) - 1}", "y", "y")
    return graph


def cycle(first: Block, *rest: Block, id: str = "cycle") -> Graph:
    """Blocks with ports `x` and `y` in a ring, closed by a carry edge; seed `x`, result `y`."""
    graph = chain(first, *rest, id=id)
    graph.add_edge(f"n{len(rest)}", "y", "n0", "x", carry=True)
    return graph


def write(folder: Path, **files: str) -> Path:
    """Write `name__ext="text"` files into a folder; gives the first one's path."""
    paths = []
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths[0]

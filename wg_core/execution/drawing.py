"""A structure as a picture in text (Mermaid, Graphviz DOT), and its plan as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from wg_core.execution.agent import AgentLoop
from wg_core.execution.block import Block
from wg_core.execution.plan import Call, Loop, LoopStart, steps_of
from wg_core.structure.port import UNSET
from wg_core.structure.topology import Edge

if TYPE_CHECKING:
    from wg_core.execution.executable_graph import ExecutableGraph


def kind_of_child(child: Any) -> str:
    """What a node holds, in a word or two."""
    return child.name if isinstance(child, Block) else f"{getattr(child, 'level', '?')} {getattr(child, 'id', '')}"


# ---- the plan as data ------------------------------------------------------------------------------------------------


def plan_data(graph: ExecutableGraph[Any], num_loop_steps: int | Mapping[str, int] | None = None) -> dict[str, Any]:
    """What a run does, in order, as JSON values.

    `{level, id, inputs, outputs, steps}`; a step is `{node, kind}`, with the `plan` of a level or the `tools` of an agent
    in it, or a loop: `{loop, num_steps, steps_from, iterations, carry: [{edge, seed}], until?, steps}`. `seed` lists
    what iteration 0 reads instead, in order of preference. Raises: ValidationError.
    """
    plan = graph.plan()
    steps: list[dict[str, Any]] = []
    at = steps
    for op in plan.program:
        if isinstance(op, LoopStart):
            steps.append(_loop_data(graph, op.loop, num_loop_steps))
            at = steps[-1]["steps"]
        elif isinstance(op, Call):
            child: Any = graph.nodes[op.node_id].child
            step: dict[str, Any] = {"node": op.node_id, "kind": kind_of_child(child)}
            if not isinstance(child, Block):
                step["plan"] = plan_data(child, num_loop_steps)
            if isinstance(op.call, AgentLoop):
                step["tools"] = {t: {"node": n.node_id, "kind": kind_of_child(n.child)} for t, n in op.call.tools().items()}
            at.append(step)
        else:
            at = steps
    outputs = [key for key, _, _ in plan.outputs] or [e["key"] for e in graph.get_output_spec()]
    return {"level": graph.level, "id": graph.id, "inputs": list(plan.inputs), "outputs": outputs, "steps": steps}


def _loop_data(graph: ExecutableGraph[Any], loop: Loop, asked: int | Mapping[str, int] | None) -> dict[str, Any]:
    steps = steps_of(loop, asked)
    named = asked is not None if not isinstance(asked, Mapping) else loop.loop_id in asked
    data: dict[str, Any] = {
        "loop": loop.loop_id,
        "num_steps": steps,
        "steps_from": "run" if named else loop.steps_from,
        "iterations": loop.iterations(steps) if loop.iterations else steps,
        "carry": [{"edge": str(e), "seed": list(_seeds(graph, e))} for e in loop.carry_edges],
        "steps": [],
    }
    spec = graph.loop_spec(loop.nodes)
    if spec is not None and spec.until:
        data["until"] = f"{spec.until['node']}.{spec.until['port']}"
    return data


def _seeds(graph: ExecutableGraph[Any], carry: Edge) -> Iterable[str]:
    node_id, port = carry.target_node, carry.target_port
    yield from (str(e) for e in graph.edges_in(node_id) if e.target_port == port and not e.carry)
    yield from (f"input {x.key}" for x in graph.exposures("in") if (x.node_id, x.port_name) == (node_id, port))
    node = graph.nodes[node_id]
    if node.defaults.get(port, graph.ports_of(node).inputs[port].default) is not UNSET:
        yield "default"


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Box:
    """A node (`box`), an outer port (`port`), or a level with boxes inside."""

    key: str
    label: str
    shape: str = "box"
    inside: list[Box] = field(default_factory=list["Box"])


@dataclass(frozen=True, slots=True)
class Arrow:
    source: str
    target: str
    label: str
    dashed: bool = False


class Drawing:
    """Boxes and arrows, to be written in one of the two languages."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.arrows: list[Arrow] = []
        self.count = 0

    def box(self, label: str, into: list[Box], shape: str = "box") -> Box:
        made = Box(f"n{self.count}", label, shape)
        self.count += 1
        into.append(made)
        return made

    def level(self, graph: ExecutableGraph[Any], into: list[Box], name: str, outer: bool) -> Ends:
        """Draw a level with all below it; gives where its ports end. Its outer ports are drawn for the outermost."""
        title = f"{name}: {graph.level}" if name else f"{graph.level} {graph.id}"
        frame = self.box(f"{title} ({graph.title})" if graph.title else title, into, "level")
        if not graph.nodes:
            frame.shape = "box"
            return Ends({}, {}, frame.key)
        ends: dict[str, Ends] = {}
        for node_id, node in graph.nodes.items():
            child: Any = node.child
            if isinstance(child, Block):
                ends[node_id] = Ends({}, {}, self.box(f"{node_id}: {kind_of_child(child)}", frame.inside).key)
            else:
                ends[node_id] = self.level(child, frame.inside, node_id, False)
        for e in graph.edges:
            for source in ends[e.source_node].of("out", e.source_port):
                for target in ends[e.target_node].of("in", e.target_port):
                    ports = e.source_port if e.source_port == e.target_port else f"{e.source_port} to {e.target_port}"
                    self.arrows.append(Arrow(source, target, ports, e.carry))
        here = Ends({}, {}, frame.key)
        for direction, side in (("in", here.into), ("out", here.out)):
            for x in graph.exposures(direction):
                if x.node_id in ends:
                    side.setdefault(x.key, []).extend(ends[x.node_id].of(direction, x.port_name))
        if outer:
            for key, targets in here.into.items():
                port = self.box(key, into, "port")
                self.arrows += [Arrow(port.key, t, "") for t in dict.fromkeys(targets)]
            for key, sources in here.out.items():
                port = self.box(key, into, "port")
                self.arrows += [Arrow(s, port.key, "") for s in dict.fromkeys(sources)]
        return here

    # ---- languages ---------------------------------------------------------------------------------------------------

    def mermaid(self) -> str:
        lines = ["flowchart LR"]

        def write(box: Box, indent: str) -> None:
            label = _mermaid_text(box.label)
            if box.inside:
                lines.append(f'{indent}subgraph {box.key}["{label}"]')
                for below in box.inside:
                    write(below, indent + "  ")
                lines.append(f"{indent}end")
            elif box.shape == "port":
                lines.append(f'{indent}{box.key}(["{label}"])')
            else:
                lines.append(f'{indent}{box.key}["{label}"]')

        for box in self.boxes:
            write(box, "  ")
        for arrow in self.arrows:
            line = "-.->" if arrow.dashed else "-->"
            label = f'|"{_mermaid_text(arrow.label)}"|' if arrow.label else ""
            lines.append(f"  {arrow.source} {line}{label} {arrow.target}")
        return "\n".join(lines) + "\n"

    def dot(self) -> str:
        lines = ["digraph {", "  rankdir=LR; compound=true; node [shape=box];"]
        leaf: dict[str, str] = {}

        def write(box: Box, indent: str) -> str:
            label = _dot_text(box.label)
            if box.inside:
                lines.append(f"{indent}subgraph cluster_{box.key} {{")
                lines.append(f"{indent}  label={label};")
                inner = [write(below, indent + "  ") for below in box.inside]
                leaf[box.key] = inner[0]  # an arrow to a cluster ends at a node in it and is clipped
                lines.append(f"{indent}}}")
            else:
                shape = " shape=ellipse" if box.shape == "port" else ""
                lines.append(f"{indent}{box.key} [label={label}{shape}];")
                leaf[box.key] = box.key
            return leaf[box.key]

        for box in self.boxes:
            write(box, "  ")
        for arrow in self.arrows:
            words = [f"label={_dot_text(arrow.label)}"] if arrow.label else []
            words += ["style=dashed"] if arrow.dashed else []
            words += [f"{e}=cluster_{k}" for e, k in (("ltail", arrow.source), ("lhead", arrow.target)) if leaf[k] != k]
            tail = f" [{' '.join(words)}]" if words else ""
            lines.append(f"  {leaf[arrow.source]} -> {leaf[arrow.target]}{tail};")
        return "\n".join([*lines, "}"]) + "\n"


@dataclass(frozen=True, slots=True)
class Ends:
    """The boxes at which a drawn node's ports end; for a block, or an unknown port, the node itself."""

    into: dict[str, list[str]]
    out: dict[str, list[str]]
    whole: str

    def of(self, direction: str, port: str) -> list[str]:
        return (self.into if direction == "in" else self.out).get(port) or [self.whole]


def draw(graph: ExecutableGraph[Any]) -> Drawing:
    """A level with everything below it; carry edges are dashed."""
    drawing = Drawing()
    drawing.level(graph, drawing.boxes, "", True)
    return drawing


def draw_cycle(title: str, cycle: Sequence[str], parts: Mapping[str, Any]) -> Drawing:
    """Levels in a ring, as a world runs them; a name without a part is a plain box, the way back is dashed."""
    drawing = Drawing()
    frame = drawing.box(title, drawing.boxes, "level")
    keys: list[str] = []
    for name in cycle:
        part = cast("ExecutableGraph[Any] | None", parts.get(name))
        if part is None:
            keys.append(drawing.box(name, frame.inside).key)
        else:
            keys.append(drawing.level(part, frame.inside, name, False).whole)
    for i, key in enumerate(keys):
        back = i == len(keys) - 1
        drawing.arrows.append(Arrow(key, keys[0] if back else keys[i + 1], "next step" if back else "", back))
    return drawing


def _mermaid_text(text: str) -> str:
    """Text between double quotes: everything with a meaning in Mermaid or HTML as an entity code."""
    return "".join(c if c.isalnum() or c in " _-./:,()+" else f"#{ord(c)};" for c in " ".join(text.split()))


def _dot_text(text: str) -> str:
    """A quoted DOT string on one line."""
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'

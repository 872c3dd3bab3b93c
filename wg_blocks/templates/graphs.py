"""Graphs for common tasks, made of identity blocks unless parameters name others.

A part is a block type (`"backbone/toy"`) or `{"block_type": ..., "config": {...}}`. Edges follow from the roles of
the parts, so every block that keeps the contract of its role fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wg_core import Graph
from wg_core.assembly.roles import KNOWN_ROLES
from wg_core.errors import TemplateParameterError

Part = str | Mapping[str, Any]


def text_to_image(
    tokenizer: Part = "tokenizer/identity",
    conditioner: Part = "conditioner/identity",
    initializer: Part = "initializer/identity",
    backbone: Part = "backbone/identity",
    guidance: Part | None = None,
    solver: Part = "solver/identity",
    codec: Part = "codec/identity",
    steps: int = 8,
    scale: float = 5.0,
    shape: Sequence[int] = (1, 3, 64, 64),
    id: str = "text_to_image",
) -> dict[str, Any]:
    """`prompt` (with `guidance` also `negative`) in, `image` out; `shape` is that of the latent."""
    made = _diffusion(id, tokenizer, conditioner, initializer, backbone, guidance, solver, steps, scale)
    made.node("dec", "codec", codec)
    made.defaults("ini", shape=[_whole("shape", n) for n in shape])
    made.output("dec", "decode_image", "image")
    return made.config()


def image_to_image(
    tokenizer: Part = "tokenizer/identity",
    conditioner: Part = "conditioner/identity",
    initializer: Part = "initializer/identity",
    backbone: Part = "backbone/identity",
    guidance: Part | None = None,
    solver: Part = "solver/identity",
    codec: Part = "codec/identity",
    steps: int = 8,
    scale: float = 5.0,
    id: str = "image_to_image",
) -> dict[str, Any]:
    """`image` and `prompt` (with `guidance` also `negative`) in, `image` out; the loop begins with the image."""
    made = _diffusion(id, tokenizer, conditioner, initializer, backbone, guidance, solver, steps, scale)
    made.node("enc", "codec", codec, hints={"codec": "encode"})
    made.node("dec", "codec", "enc", shares=True)
    made.input("enc", "encode_image", "image")
    made.output("dec", "decode_image", "image")
    return made.config()


def upscale(
    enlarge: Part | None = None,
    tokenizer: Part = "tokenizer/identity",
    conditioner: Part = "conditioner/identity",
    initializer: Part = "initializer/identity",
    backbone: Part = "backbone/identity",
    guidance: Part | None = None,
    solver: Part = "solver/identity",
    codec: Part = "codec/identity",
    factor: int = 2,
    steps: int = 4,
    scale: float = 5.0,
    id: str = "upscale",
) -> dict[str, Any]:
    """`image` [B,C,H,W] (and perhaps a `prompt`) in, `image` `factor` times as large out: enlarged, then refined."""
    made = _diffusion(id, tokenizer, conditioner, initializer, backbone, guidance, solver, steps, scale)
    made.defaults("tok", text="")
    part = enlarge or {"block_type": "image/enlarge", "config": {"factor": _whole("factor", factor)}}
    made.node("up", None, part)
    made.node("enc", "codec", codec, hints={"codec": "encode"})
    made.node("dec", "codec", "enc", shares=True)
    made.edge("up", "enlarged", "enc", "encode_image")
    made.input("up", "image", "image")
    made.output("dec", "decode_image", "image")
    return made.config()


def text_to_text(llm: Part = "llm/identity", id: str = "text_to_text") -> dict[str, Any]:
    """`prompt` (and perhaps `context`, `system`, `params`) in, `text` out."""
    made = _Maker(id, "llm")
    made.node("llm", "llm", llm)
    for port in ("prompt", "context", "system", "params"):
        made.input("llm", port, port)
    made.output("llm", "text", "text")
    return made.config()


def agent_with_tools(
    agent: Part = "agent/identity",
    tools: Sequence[Part] | Mapping[str, Part] = ("tool/echo", "tool/calc"),
    id: str = "agent_with_tools",
) -> dict[str, Any]:
    """`prompt` (and perhaps `system`) in, `response` out; `tools` by id, or a list that is named by the types."""
    if isinstance(tools, str):
        raise TemplateParameterError(f"tools is a list of parts or a mapping, not {tools!r}")
    named = (
        tools if isinstance(tools, Mapping) else {_part("tools", t)["block_type"].rpartition("/")[2]: t for t in tools}
    )
    if len(named) != len(tools):
        raise TemplateParameterError("two tools have the same name; give tools as a mapping of ids to parts")
    made = _Maker(id, "agent")
    made.node("agent", None, agent)
    for tool_id, part in named.items():
        made.node(tool_id, None, part)
    made.input("agent", "context", "prompt")
    made.input("agent", "system", "system")
    made.output("agent", "response", "response")
    return {**made.config(), "tools": {tool_id: {"node": tool_id} for tool_id in named}}


def _diffusion(
    id: str,
    tokenizer: Part,
    conditioner: Part,
    initializer: Part,
    backbone: Part,
    guidance: Part | None,
    solver: Part,
    steps: int,
    scale: float,
) -> _Maker:
    """The loop that all image tasks share, with an unconditional branch on the same blocks if there is guidance."""
    made = _Maker(id, "diffusion", {"num_loop_steps": _whole("steps", steps)})
    made.node("tok", "tokenizer", tokenizer)
    made.node("txt", "conditioner", conditioner)
    made.node("ini", "initializer", initializer)
    made.node("net", "backbone", backbone)
    made.input("tok", "text", "prompt")
    if guidance is not None:
        for node_id, role, first in (
            ("tok0", "tokenizer", "tok"),
            ("neg", "conditioner", "txt"),
            ("net0", "backbone", "net"),
        ):
            made.node(node_id, role, first, shares=True, hints={"branch": "uncond"})
        made.node("cfg", "guidance", guidance)
        made.defaults("cfg", scale=scale)
        made.defaults("tok0", text="")
        made.input("tok0", "text", "negative")
    made.node("stp", "solver", solver)
    return made


class _Maker:
    """Writes a graph's configuration; a graph of the roles' bare contracts says which edges follow."""

    def __init__(self, id: str, task_kind: str, metadata: Mapping[str, Any] | None = None) -> None:
        self.contract = Graph(id)
        self.entries: dict[str, dict[str, Any]] = {}
        self.written: dict[str, Any] = {
            "kind": "graph",
            "id": id,
            "task_kind": task_kind,
            "metadata": dict(metadata or {}),
        }
        self.edges: list[dict[str, Any]] = []
        self.exposed: dict[str, list[dict[str, Any]]] = {"exposed_inputs": [], "exposed_outputs": []}

    def node(
        self,
        node_id: str,
        role: str | None,
        part: Part,
        *,
        shares: bool = False,
        hints: Mapping[str, str] | None = None,
    ) -> None:
        if role is not None:
            self.contract.add_node(KNOWN_ROLES[role](), node_id, hints=hints)
        what = {"shares": part} if shares else _part(role or node_id, part)
        self.entries[node_id] = {"node_id": node_id, **what, **({"hints": dict(hints)} if hints else {})}

    def defaults(self, node_id: str, **values: Any) -> None:
        self.entries[node_id]["defaults"] = values

    def edge(self, source: str, source_port: str, target: str, target_port: str) -> None:
        self.edges.append(
            {"source_node": source, "source_port": source_port, "target_node": target, "target_port": target_port}
        )

    def input(self, node_id: str, port: str, name: str) -> None:
        self.exposed["exposed_inputs"].append({"name": name, "node_id": node_id, "port_name": port})

    def output(self, node_id: str, port: str, name: str) -> None:
        self.exposed["exposed_outputs"].append({"name": name, "node_id": node_id, "port_name": port})

    def config(self) -> dict[str, Any]:
        automatic = [
            {
                "source_node": e.source_node, "source_port": e.source_port,
                "target_node": e.target_node, "target_port": e.target_port,
                **({"carry": True} if e.carry else {}), "origin": "auto",
            }
            for e in self.contract.edges
        ]  # fmt: skip
        return {
            **self.written,
            "nodes": list(self.entries.values()),
            "edges": [*self.edges, *automatic],
            **self.exposed,
        }


def _part(name: str, part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"block_type": part}
    if isinstance(part, Mapping) and "block_type" in part and part.keys() <= {"block_type", "config"}:
        return dict(part)
    raise TemplateParameterError(f"{name} is a block type or {{'block_type': ..., 'config': {{...}}}}, not {part!r}")


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise TemplateParameterError(f"{name} is {value!r}; use a whole number >= 1")
    return value


GRAPHS = {
    "text_to_image": text_to_image,
    "image_to_image": image_to_image,
    "upscale": upscale,
    "text_to_text": text_to_text,
    "agent_with_tools": agent_with_tools,
}

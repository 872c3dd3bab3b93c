"""The tool table of a graph: which nodes an agent may call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from wg_core.errors import ToolError, did_you_mean
from wg_core.execution.block import Block


def tool_entry(
    graph_id: str,
    tool_id: str,
    node_id: str,
    block: Block,
    *,
    description: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    result_port: str | None = None,
) -> dict[str, Any]:
    """The table entry of a node that can be called as a tool; `parameters` is a JSON schema of its arguments.

    Raises: ToolError for a bad id, a required input that no JSON argument can fill, or an unclear result.
    """
    where = f"{graph_id}: node {node_id!r} cannot be tool {tool_id!r}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool_id):
        raise ToolError(f"{where}: an id is 1 to 64 letters, digits, '_' and '-'")
    ports = block.port_index
    for name, port in ports.inputs.items():
        if port.required and set(port.types) <= {"tensor", "world"}:
            raise ToolError(
                f"{where}: its input {name!r} needs a {'|'.join(port.types)}, which no argument can be; make it optional"
            )
    results = [name for name, port in ports.outputs.items() if not port.optional] or list(ports.outputs)
    if result_port is not None and result_port not in ports.outputs:
        raise ToolError(f"{where}: it has no output {result_port!r}; {did_you_mean(result_port, ports.outputs)}")
    if result_port is None and len(results) != 1:
        raise ToolError(
            f"{where}: it has {len(results)} outputs ({', '.join(results)}); say which is the result with result_port"
        )
    given = {
        "description": description,
        "parameters": dict(parameters) if parameters else None,
        "result_port": result_port,
    }
    return {"node": node_id, **{k: v for k, v in given.items() if v is not None}}

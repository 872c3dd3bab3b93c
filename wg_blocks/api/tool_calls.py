"""Native tool calls: the tools that a model may call, and its calls, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wg_blocks.api.providers import ToolCall
from wg_blocks.json_schema import check_schema, problems
from wg_core import Port
from wg_core.errors import PortValueError, did_you_mean

TOOL_PORTS = (
    Port(
        "tools", "in", "list", True, description="what the model may call: {name, description, parameters: JSON schema}"
    ),
    Port("tool_calls", "out", "list", optional=True, description="{id, name, arguments}, when it calls any"),
)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def checked_tools(tools: Any, who: str) -> list[dict[str, Any]]:
    """Tools as plain data. Raises: PortValueError for what is none, ConfigError for a bad schema."""
    out: list[dict[str, Any]] = []
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(tool.get("parameters"), Mapping):
            raise PortValueError(f"{who}: a tool is {{name, description, parameters}}, parameters a JSON schema")
        if not isinstance(tool.get("name"), str) or not _NAME.fullmatch(tool["name"]):
            raise PortValueError(f"{who}: {tool.get('name')!r} is no name of a tool; letters, digits, '_' and '-' are")
        check_schema(tool["parameters"])
        described = str(tool.get("description") or "")
        out.append({"name": tool["name"], "description": described, "parameters": dict(tool["parameters"])})
    names = [tool["name"] for tool in out]
    if len(set(names)) < len(names):
        raise PortValueError(f"{who}: two tools have one name: {', '.join(names)}")
    return out


def read_calls(calls: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The calls with their arguments as data, in order, and what is wrong with them."""
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    out: list[dict[str, Any]] = []
    wrong: list[str] = []
    for call in calls:
        if call.name not in schemas:
            wrong.append(f"there is no tool {call.name!r}; {did_you_mean(call.name, schemas)}")
            continue
        if not call.id or any(call.id == other["id"] for other in out):
            wrong.append(f"the call of {call.name} has no id of its own ({call.id!r})")
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError) as error:
            wrong.append(f"the arguments of {call.name} are no JSON: {error}")
            continue
        found = problems(schemas[call.name], arguments) if isinstance(arguments, dict) else ["they are no object"]
        wrong += [f"the arguments of {call.name}: {problem}" for problem in found]
        out.append({"id": call.id, "name": call.name, "arguments": arguments})
    return out, wrong

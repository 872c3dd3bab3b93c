"""Native tool calls: the tools that a model may call, whether it may, and its calls, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wg_blocks.api.base import no_number
from wg_blocks.api.providers import ToolCall
from wg_blocks.json_schema import check_schema, problems
from wg_blocks.prompt import clean
from wg_core import Port
from wg_core.errors import PortValueError, did_you_mean

TOOL_PORTS = (
    Port(
        "tools", "in", "list", True, description="what the model may call: {name, description, parameters: JSON schema}"
    ),
    Port(
        "tool_choice", "in", "text", True, schema={"type": "string", "enum": ["auto", "none", "required"]},
        description="whether the model may call tools, may not, or must; without it, it may",
    ),
    Port(
        "tool_errors", "in", "text", True, schema={"type": "string", "enum": ["raise", "result"]},
        description="what becomes of calls that cannot be: asked again, then an error; or handed on with what is wrong",
    ),
    Port(
        "tool_calls", "out", "list", optional=True,
        description="{id, name, arguments} when it calls any; `error` says what is wrong with one that is handed on",
    ),
)  # fmt: skip
CHOICES = ("auto", "none", "required")
ERRORS = ("raise", "result")
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


def one_of(value: Any, known: Sequence[str], what: str) -> str:
    """A word that is known, the first one where none is given. Raises: PortValueError."""
    if value is not None and value not in known:
        raise PortValueError(f"{what} cannot be {value!r}; it is one of {', '.join(known)}")
    return value or known[0]


def read_calls(calls: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The calls with their arguments as data, in order, and what is wrong with them.

    A call that cannot be has an `error`; its arguments are the text as it was written where that is no object. An id
    that is missing or comes twice is replaced by one that does not: results are told by id.
    """
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    ids = {call.id for call in calls}
    out: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        own = clean(call.id)
        if not own or any(own == other["id"] for other in out):
            own = next(n for n in (f"call_{i}{'_' * k}" for k in range(len(calls) + 1)) if n not in ids)
        arguments, wrong = _arguments(call, schemas)
        read = {"id": own, "name": _named(call.name), "arguments": arguments}
        out.append(read | ({"error": "; ".join(wrong)} if wrong else {}))
    return out, [call["error"] for call in out if "error" in call]


def _arguments(call: ToolCall, schemas: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The arguments, as the text that was written where they are no object, and what is wrong with the call."""
    about = f"the arguments of {call.name}"
    wrong: list[str] = []
    try:
        arguments: Any = clean(json.loads(call.arguments or "{}", parse_constant=no_number))
        if not isinstance(arguments, dict):
            arguments, wrong = clean(call.arguments), [f"{about}: they are no object"]
    except (ValueError, RecursionError) as error:
        arguments, wrong = clean(call.arguments), [f"{about} are no JSON: {error}"]
    if call.name not in schemas:
        wrong = [f"there is no tool {call.name!r}; {did_you_mean(call.name, schemas)}"]
    elif not wrong:
        wrong = [f"{about}: {problem}" for problem in problems(schemas[call.name], arguments)]
    return arguments, wrong


def _named(name: str) -> str:
    """A name as providers take it back in a conversation, whatever the model wrote."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] or "_"


def arguments_text(call: Mapping[str, Any]) -> str:
    """The arguments of a call as the model wrote them: JSON, or the text that was none."""
    given = call["arguments"]
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)

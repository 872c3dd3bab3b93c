"""The tool table of a graph: which nodes an agent may call, and what it is told about them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from wg_core.errors import ToolError, did_you_mean
from wg_core.execution.agent import MEDIA, Tool, ToolSpec, is_agentic
from wg_core.execution.block import Block
from wg_core.execution.reach import HOST, PATHS, URL, Reach, places
from wg_core.structure.port import UNSET, Port, supertypes

ENTRY = ("node", "description", "parameters", "result_port", "timeout", "roots", "hosts")

_JSON_TYPES = {
    "text": "string", "number": "number", "dict": "object", "list": "array", "link": "object",
    **dict.fromkeys(MEDIA, "string"),
}  # fmt: skip


def tool_entry(
    graph_id: str,
    tool_id: str,
    node_id: str,
    block: Block,
    *,
    description: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    result_port: str | None = None,
    timeout: float | None = None,
    roots: Sequence[str] = (),
    hosts: Sequence[str] = (),
    fed: Collection[str] = (),
    finished: bool = False,
) -> dict[str, Any]:
    """The table entry of a node that can be called as a tool; `parameters` is a JSON schema of its arguments.

    `roots` are folders, within which arguments with format `path`, `file-path` or `directory-path` lie; `hosts` those
    that arguments with format `uri` may name.

    `fed` are the inputs that have their value from the graph. A view of a world may come later, where the graph is not
    `finished`.

    Raises: ToolError for a bad id, an agent, a required input that no JSON argument can fill, an unclear result, a
    schema of other arguments than there are inputs, or a host that is none.
    """
    where = f"{graph_id}: node {node_id!r} cannot be tool {tool_id!r}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool_id):
        raise ToolError(f"{where}: an id is 1 to 64 letters, digits, '_' and '-'")
    if is_agentic(block):
        raise ToolError(f"{where}: it is an agent; put it with its tools into a graph of its own, as a graph/ref")
    ports = block.port_index
    for name, port in ports.inputs.items():
        if not port.required or name in fed or _fillable(port) or (not finished and "world" in port.types):
            continue
        raise ToolError(
            f"{where}: its input {name!r} needs a {'|'.join(port.types)}, which no argument can be; make it optional, "
            "or feed it in the graph: by an edge, an exposed input or a default"
        )
    results = _results(block)
    if result_port is not None and result_port not in ports.outputs:
        raise ToolError(f"{where}: it has no output {result_port!r}; {did_you_mean(result_port, ports.outputs)}")
    if result_port is None and len(results) != 1:
        raise ToolError(
            f"{where}: it has {len(results)} outputs ({', '.join(results)}); say which is the result with result_port"
        )
    if timeout is not None and (isinstance(timeout, bool) or not timeout > 0):
        raise ToolError(f"{where}: timeout is a number of seconds > 0, not {timeout!r}")
    if parameters is not None:
        _check_parameters(where, parameters, ports.inputs, fed)
    for host in hosts:
        if not re.fullmatch(HOST, host):
            raise ToolError(f"{where}: {host!r} is no host; write name, *.name or either with :port, in small letters")
    given = {
        **({"roots": [*roots]} if roots else {}), **({"hosts": [*hosts]} if hosts else {}),
        "description": description,
        "parameters": dict(parameters) if parameters else None,
        "result_port": result_port,
        "timeout": timeout,
    }
    return {"node": node_id, **{k: v for k, v in given.items() if v is not None}}


def entry_options(graph_id: str, tool_id: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a table entry says beside its node. Raises: ToolError for unknown keys and values of a wrong kind."""
    for key in entry:
        if key not in ENTRY:
            raise ToolError(f"{graph_id}: tool {tool_id!r} has an unknown key {key!r}; {did_you_mean(key, ENTRY)}")
    kinds: dict[str, Any] = {
        "description": str, "parameters": Mapping, "result_port": str, "timeout": (int, float), "roots": list, "hosts": list,
    }  # fmt: skip
    for key, kind in kinds.items():
        if entry.get(key) is not None and not isinstance(entry[key], kind):
            raise ToolError(f"{graph_id}: tool {tool_id!r}: {key} cannot be {entry[key]!r}")
    for key in ("roots", "hosts"):
        if not all(isinstance(v, str) and v for v in entry.get(key) or ()):
            raise ToolError(f"{graph_id}: tool {tool_id!r}: {key} is a list of texts, not {entry[key]!r}")
    return {k: v for k, v in entry.items() if k != "node"}


def tool_of(tool_id: str, entry: Mapping[str, Any], block: Block, defaults: Collection[str], fed: Sequence[str]) -> Tool:
    """A checked table entry as the engine calls it."""
    spec = ToolSpec(
        tool_id,
        entry.get("description") or (type(block).__doc__ or "").strip().partition("\n")[0],
        entry.get("parameters") or parameters_of(block, defaults, fed),
    )
    named = places(spec.parameters, block.port_index.inputs)
    reach = Reach(named, tuple(entry.get("roots") or ()), tuple(entry.get("hosts") or ())) if named else None
    result = entry.get("result_port") or _results(block)[0]
    return Tool(spec, entry["node"], result, tuple(fed), entry.get("timeout"), reach)


def check_reach(graph_id: str, tool: Tool, entry: Mapping[str, Any]) -> None:
    """Raises: ToolError for arguments that are paths or URLs without limits, and for limits that no argument is held to."""
    forms = {form for form, _ in tool.reach.places.values()} if tool.reach is not None else set[str]()
    for name, kinds in (("roots", PATHS), ("hosts", (URL,))):
        held = sorted(forms & set(kinds))
        if held and not entry.get(name):
            raise ToolError(f"{graph_id}: tool {tool.spec.id!r} takes a {'|'.join(held)}; say with {name} what it may reach")
        if entry.get(name) and not held:
            raise ToolError(
                f"{graph_id}: {name} of tool {tool.spec.id!r} limit nothing, as no argument has format {'|'.join(kinds)}; "
                "give it in the port's schema or in parameters"
            )


def parameters_of(block: Block, defaults: Collection[str] = (), fed: Collection[str] = ()) -> dict[str, Any]:
    """The JSON schema of what an agent gives to a block: its inputs, without those that are `fed` by the graph.

    What has a default there or at the port may be left out, and what no JSON value can be is left out.
    """
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, port in block.port_index.inputs.items():
        if name in fed or not _fillable(port):
            continue
        properties[name] = _schema_of(port)
        if port.required and name not in defaults:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _fillable(port: Port) -> bool:
    return "any" in port.types or any(_json_type(t) for t in port.types)


def _json_type(name: str) -> str | None:
    """What a port type is in JSON, if it is anything there."""
    return next((_JSON_TYPES[t] for t in (name, *supertypes(name)) if t in _JSON_TYPES), None)


def _schema_of(port: Port) -> dict[str, Any]:
    kinds = [k for k in dict.fromkeys(map(_json_type, port.types)) if k]
    schema: dict[str, Any] = {}
    if kinds and "any" not in port.types:
        schema["type"] = kinds[0] if len(kinds) == 1 else kinds
    if isinstance(port.schema, Mapping):
        own = cast("Mapping[str, Any]", port.schema)
        schema |= {k: v for k, v in own.items() if k not in ("shape", "dtype")}
    text = port.description
    if set(port.types) & MEDIA and not set(port.types) & {"text", "any"}:
        text = "; ".join(filter(None, (text, f"a reference to {'|'.join(port.types)}: the call_id of a result")))
    if text:
        schema.setdefault("description", text)
    if port.default is not UNSET and port.default is not None:
        schema.setdefault("default", port.default)
    return schema


def _results(block: Block) -> list[str]:
    outputs = block.port_index.outputs
    return [name for name, port in outputs.items() if not port.optional] or list(outputs)


def _check_parameters(where: str, schema: Mapping[str, Any], inputs: Mapping[str, Port], fed: Collection[str]) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(dict(schema))
    except SchemaError as error:
        raise ToolError(f"{where}: parameters is no JSON schema: {error.json_path}: {error.message[:200]}") from error
    if "'$ref'" in str(schema):
        raise ToolError(f"{where}: write parameters without $ref; they become a part of the agent's own schema")
    properties: Any = schema.get("properties", {})
    for name in properties:
        if name not in inputs or name in fed:
            free = [n for n in inputs if n not in fed]
            raise ToolError(f"{where}: parameters names {name!r}, which is no input that a call fills; {did_you_mean(name, free)}")
    if schema.get("type") != "object" or schema.get("additionalProperties", True) is not False:
        raise ToolError(f"{where}: parameters has type: object and additionalProperties: false")

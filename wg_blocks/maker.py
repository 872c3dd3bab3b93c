"""The maker: carries out requests by the makers of a tool table, and says which requests are possible."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from wg_blocks.json_schema import check_schema, problems
from wg_core import Block, Port, current_context
from wg_core.errors import ConfigError, OutputContractError, ToolError, did_you_mean
from wg_core.execution.context import CallContext, derive_seed
from wg_core.structure.ids import check_id

Build = Callable[[dict[str, Any]], Block]

MAX_SEED: Final = 2**63 - 1
_MEDIA: Final = ("image", "text")  # output kinds that become artifacts; others stay inside
_REF: Final = {"type": "string", "minLength": 64, "maxLength": 64, "description": "id of an artifact"}
_BY_TYPE: Final[dict[str, dict[str, Any]]] = {
    "number": {"type": "number"},
    "text": {"type": "string", "maxLength": 200},
    "ref": _REF,
    "image": _REF,
}
# --- schemas ---------------------------------------------------------------------------------------------------------


def schema_error(value: Any, schema: Mapping[str, Any], where: str) -> str | None:
    """What is wrong with a value under a schema, in words; None if nothing is. NaN and infinity are no numbers."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"{where} is no JSON value: {error}"
    found = problems(schema, value)
    return f"{where}{found[0].removeprefix('$')}" if found else None


def params_schema(maker: Block, where: str) -> dict[str, Any]:
    """The JSON schema of a maker's params, from its input ports; `seed` belongs to the request and is left out.

    An image is given as the id of an artifact. An optional port of a kind that has no JSON form is left out.
    Raises: ToolError for a required port that has none, or a schema with unknown keywords.
    """
    properties: dict[str, Any] = {}
    for port in maker.input_ports:
        if port.name == "seed":
            continue
        is_schema = isinstance(port.schema, Mapping) and "type" in port.schema and "image" not in port.types
        found = dict(port.schema) if is_schema else next((dict(_BY_TYPE[t]) for t in port.types if t in _BY_TYPE), None)
        if found is None:
            if port.required:
                kinds = "|".join(port.types)
                raise ToolError(
                    f"{where}: input {port.name!r} ({kinds}) cannot be asked for; give it a schema or default"
                )
            continue
        try:
            check_schema(found)
        except ConfigError as error:
            raise ToolError(f"{where}.{port.name}: {error}") from error
        if port.description:
            found.setdefault("description", port.description)
        properties[port.name] = found
    required = [p.name for p in maker.input_ports if p.required and p.name in properties]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


# --- the block -------------------------------------------------------------------------------------------------------


class Dispatch(Block):
    """Carries out requests by the makers of its tool table.

    `makers` maps a name to `{block: {block_type, config}}` or `{graph: <graph config>}` with `slot` (where its
    artifacts go) and an optional `description`. A maker takes its wishes on its input ports and its seed on an input
    port `seed`; each image and each text that it gives becomes an artifact.

    Input `requests`: [{id, slot, maker, params, seed?}]. All of them are checked before the first one is carried out.
    A missing seed derives from the node's seed and the request's index. Output `artifacts`: {slot: [Artifact]}.

    Raises: ToolError for a wrong table or request.
    """

    ports = (
        Port("requests", "in", "list", description="what to make: [{id, slot, maker, params, seed?}]"),
        Port("artifacts", "out", "dict", description="what was made: {slot: [Artifact]}"),
    )

    def __init__(self, *, makers: dict[str, Any], max_requests: int = 4, build: Build) -> None:
        super().__init__()
        if not makers:
            raise ToolError("maker/dispatch has no makers; add one, as {map: {block: {block_type: ...}, slot: images}}")
        if not isinstance(max_requests, int) or isinstance(max_requests, bool) or not 1 <= max_requests <= 64:
            raise ToolError(f"max_requests is 1 to 64, not {max_requests!r}")
        self.max_requests = max_requests
        self._slots: dict[str, str] = {}
        self._about: dict[str, str] = {}
        self._makers: dict[str, Block] = {}
        self._schemas: dict[str, dict[str, Any]] = {}
        for name, entry in makers.items():
            where = f"makers.{check_id(name, 'maker name')}"
            self._makers[name] = maker = _build(entry, where, build)
            self._slots[name] = check_id(entry["slot"], f"{where}.slot")
            self._about[name] = str(entry.get("description", ""))
            self._schemas[name] = params_schema(maker, where)
            if not any(t in _MEDIA for p in maker.output_ports for t in p.types):
                gives = ", ".join(f"{p.name} ({'|'.join(p.types)})" for p in maker.output_ports) or "nothing"
                raise ToolError(f"{where} gives {gives}; a maker gives an output of type {' or '.join(_MEDIA)}")

    def get_sub_blocks(self) -> dict[str, Block]:
        return dict(self._makers)

    def request_schema(self, names: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
        """The JSON schema by which a language model writes requests: {"requests": [{id, slot, maker, params}]}.

        It asks for every param, also for those that a request may leave out (but artifacts), and for no seed. A param
        whose port has a tag in `names` (such as `place`) is restricted to the names given there. Whatever obeys it,
        with ids that differ, is a request that this block carries out.
        """
        ids = [f"r{n + 1}" for n in range(self.max_requests)]
        forms: list[dict[str, Any]] = []
        for name, schema in self._schemas.items():
            form: dict[str, Any] = {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "enum": ids},
                    "slot": {"type": "string", "const": self._slots[name]},
                    "maker": {"type": "string", "const": name},
                    "params": {**schema, **self._asked(name, names or {})},
                },
                "required": ["id", "slot", "maker", "params"],
                "additionalProperties": False,
            }
            if self._about[name]:
                form["description"] = self._about[name]
            forms.append(form)
        one = forms[0] if len(forms) == 1 else {"anyOf": forms}
        requests = {"type": "array", "minItems": 1, "maxItems": self.max_requests, "items": one}
        return {
            "type": "object",
            "properties": {"requests": requests},
            "required": ["requests"],
            "additionalProperties": False,
        }

    def _asked(self, maker: str, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        properties = dict(self._schemas[maker]["properties"])
        for port in self._makers[maker].input_ports:
            if port.optional and {"image", "ref"} & set(port.types) and not names.get(port.tag or ""):
                properties.pop(port.name, None)  # a model does not know the ids of artifacts
            if port.name in properties and names.get(port.tag or ""):
                properties[port.name] = {"type": "string", "enum": list(names[port.tag or ""])}
        return {"properties": properties, "required": list(properties)}

    def check(self, requests: Sequence[Any]) -> None:
        """Raises: ToolError for the first request that cannot be carried out."""
        if not 1 <= len(requests) <= self.max_requests:
            raise ToolError(f"requests are 1 to {self.max_requests} (max_requests), not {len(requests)}")
        seen: set[str] = set()
        for index, request in enumerate(requests):
            where = f"requests[{index}]"
            if not isinstance(request, Mapping):
                raise ToolError(f"{where} is an object {{id, slot, maker, params, seed?}}, not {request!r:.80}")
            known = ("id", "slot", "maker", "params", "seed")
            if unknown := [k for k in request if k not in known]:
                raise ToolError(f"{where} has no {unknown[0]!r}; {did_you_mean(str(unknown[0]), known)}")
            if missing := [k for k in known[:4] if k not in request]:
                raise ToolError(f"{where} lacks {missing[0]!r}")
            if check_id(request["id"], f"{where}.id") in seen:
                raise ToolError(f"{where}.id {request['id']!r} is taken by an earlier request; give each its own")
            seen.add(request["id"])
            name = request["maker"]
            if not isinstance(name, str) or name not in self._makers:
                raise ToolError(
                    f"{where}.maker {name!r:.80} is not in the tool table; valid: {', '.join(self._makers)}"
                )
            if request["slot"] != self._slots[name]:
                raise ToolError(
                    f"{where}.slot is {self._slots[name]!r} for maker {name!r}, not {request['slot']!r:.80}"
                )
            if isinstance(request["params"], Mapping):
                if "seed" in request["params"]:
                    raise ToolError(f"{where}.params has no 'seed'; a seed stands in the request itself")
                for key in request["params"]:
                    if key not in (known := self._schemas[name]["properties"]):
                        raise ToolError(f"{where}.params has no {key!r:.80}; {did_you_mean(str(key), known)}")
            if error := schema_error(request["params"], self._schemas[name], f"{where}.params"):
                raise ToolError(error)
            seed = {"type": "integer", "minimum": 0, "maximum": MAX_SEED}
            if "seed" in request and (error := schema_error(request["seed"], seed, f"{where}.seed")):
                raise ToolError(error)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        requests = inputs["requests"]
        self.check(requests)
        context = current_context()
        artifacts: dict[str, list[dict[str, Any]]] = {}
        for index, request in enumerate(requests):
            context.emit("progress", done=index, total=len(requests), text=request["maker"])
            seed = request["seed"] if "seed" in request else derive_seed(context.node_seed(), index)
            artifacts.setdefault(request["slot"], []).extend(self._make(context, index, request, seed))
        context.emit("progress", done=len(requests), total=len(requests))
        return {"artifacts": artifacts}

    def _make(self, context: CallContext, index: int, request: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
        name = request["maker"]
        maker, ports = self._makers[name], {p.name: p for p in self._makers[name].input_ports}
        given = dict(request["params"])
        for key in given:
            if "image" in ports[key].types:
                given[key] = _open_image(context, given[key], f"requests[{index}].params.{key}")
        if "seed" in ports:
            given["seed"] = seed
        outputs = maker.run(given)
        made_by = {
            "maker": name,
            "graph": f"{context.path}/{name}" if context.path else name,
            "models": _models(maker),
            "seed": seed,
            "request": index,
        }
        made: list[dict[str, Any]] = []
        for port in maker.output_ports:
            kind = next((t for t in port.types if t in _MEDIA), None)
            if kind is None or port.name not in outputs:
                continue
            value, where = outputs[port.name], f"maker {name!r}, output {port.name!r}"
            for data, form in (
                _texts(value, where) if kind == "text" or isinstance(value, str) else _images(value, where)
            ):
                sha = context.blobs.put(data)
                made.append(
                    {"id": sha, **form, "slot": request["slot"], "uri": f"blob:{sha}", "made_by": dict(made_by)}
                )
        if not made:
            raise OutputContractError(f"maker {name!r} gave no image and no text for requests[{index}]")
        return made


def _build(entry: Any, where: str, build: Build) -> Block:
    keys = ("block", "graph", "slot", "description")
    if not isinstance(entry, Mapping):
        raise ToolError(f"{where} is a mapping with block or graph, and slot")
    if unknown := [k for k in entry if k not in keys]:
        raise ToolError(f"{where} has no {unknown[0]!r}; {did_you_mean(str(unknown[0]), keys)}")
    if ("block" in entry) == ("graph" in entry) or "slot" not in entry:
        raise ToolError(f"{where} needs 'slot' and one of 'block' and 'graph'; it has {sorted(entry)}")
    if "block" in entry:
        return build(dict(entry["block"]))
    return build({"block_type": "graph/ref", "config": {"graph": dict(entry["graph"])}})


def _models(maker: Block) -> list[str]:
    """The models below a maker, `block_type:reference` each, in order and once."""
    found: dict[str, None] = {}
    for block in maker.iter_blocks():
        if (key := block.model_ref()) is not None:
            config = block.config
            found[f"{key[0]}:{config.get('checkpoint_ref') or config.get('model_id')}"] = None
    return list(found)


def _texts(value: Any, where: str) -> list[tuple[bytes, dict[str, Any]]]:
    texts: list[Any] = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(t, str) for t in texts):
        raise OutputContractError(f"{where} is no text")
    return [(t.encode(), {"media_type": "text/plain; charset=utf-8", "length": len(t)}) for t in texts]


def _images(value: Any, where: str) -> list[tuple[bytes, dict[str, Any]]]:
    import numpy as np

    from wg_blocks.maps import to_png

    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim != 4 or array.shape[1] != 3 or not np.isfinite(array).all():
        raise OutputContractError(f"{where} is a finite image [B, 3, H, W], not {array.dtype} {list(array.shape)}")
    pixels = np.rint(np.clip(array.astype(np.float64), 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    form = {"media_type": "image/png", "width": array.shape[3], "height": array.shape[2]}
    return [(to_png(np.ascontiguousarray(p)), dict(form)) for p in pixels]


def _open_image(context: CallContext, sha: str, where: str) -> Any:
    """The stored picture `sha` as float32 [1, 3, H, W] in 0..1."""
    import numpy as np

    from wg_blocks.maps import from_png

    if not context.blobs.has(sha):
        raise ToolError(f"{where}: no artifact {sha[:12]!r} is stored in this run; give the id of one")
    pixels = from_png(context.blobs.get(sha), where)
    return np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255))

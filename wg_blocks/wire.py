"""Values on the wire: plain JSON where JSON can say it, tagged objects and raw bytes where it cannot. Never pickle.

A tagged object is `{"$wg": KIND, ...}`. Tensors travel as safetensors, arrays as their raw bytes with dtype and shape,
both with everything else in one body: a JSON text, or, when some bytes are larger than `INLINE`, a container
`length of the JSON (8 bytes, little endian) + JSON + parts`, in which a tagged object names its part by offset and size.
JSON has no NaN and no infinities, so such floats are tagged by name and come back as they were.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from wg_core.errors import MissingCredentialError, PortValueError
from wg_core.execution.blobs import BlobStore
from wg_core.state.canonical import is_sha256, parse_json
from wg_core.state.content import WorldContent
from wg_core.state.state import State
from wg_core.state.view import WorldView
from wg_core.structure.hyperlink import HyperLink
from wg_core.structure.port import kind_of

INLINE = 16 * 1024
JSON_TYPE = "application/json"
PARTS_TYPE = "application/x-wg-parts"
TAG = "$wg"
MAX_DEPTH = 64
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_ARRAY_KINDS = "biufc"


class Packed:
    """A value on its way out: collects parts, and the blobs that it refers to.

    `refer(sha)` says that a blob is meant; `keep(content)` stores a world's content and gives its root.
    """

    def __init__(self, blobs: BlobStore | None = None) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.refs: dict[str, None] = {}
        self.blobs = blobs

    def data(self, raw: bytes) -> dict[str, Any]:
        """Bytes inside the JSON if they are few, else as a part."""
        if len(raw) <= INLINE:
            return {"data": base64.b64encode(raw).decode("ascii")}
        self.parts.append(raw)
        self.size += len(raw)
        return {"part": [self.size - len(raw), len(raw)]}

    def body(self, value: Any) -> tuple[str, list[bytes]]:
        """Media type, and the body in pieces, of a JSON tree that `encode` made."""
        text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
        if not self.parts:
            return JSON_TYPE, [text]
        return PARTS_TYPE, [len(text).to_bytes(8, "little"), text, *self.parts]


def unpack(media_type: str, body: bytes) -> tuple[Any, memoryview]:
    """The JSON tree of a body and its parts. Raises: ValueError."""
    kind = media_type.split(";")[0].strip().lower()
    if kind == JSON_TYPE:
        return parse_json(body), memoryview(b"")
    if kind != PARTS_TYPE:
        raise ValueError(f"media type {kind!r} is neither {JSON_TYPE} nor {PARTS_TYPE}")
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > len(body) - 8:
        raise ValueError("the body is cut off")
    return parse_json(body[8 : 8 + size]), memoryview(body)[8 + size :]


def encode(value: Any, packed: Packed, path: str = "value", depth: int = 0) -> Any:
    """A JSON tree of `value`; large bytes go into `packed`.

    Raises: PortValueError naming the place of what cannot travel.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        if is_sha256(value.removeprefix("blob:")):
            packed.refs[value.removeprefix("blob:")] = None
        return str.__str__(value)
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {TAG: "float", "value": _float_name(value)}
    if depth >= MAX_DEPTH:
        raise PortValueError(f"{path}: nested deeper than {MAX_DEPTH} levels (or a list or dict that holds itself)")
    if isinstance(value, list):
        return [encode(v, packed, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {TAG: "tuple", "items": [encode(v, packed, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]}
    if isinstance(value, Mapping):
        if TAG not in value and all(type(k) is str for k in value):
            return {k: encode(v, packed, f"{path}.{k}", depth + 1) for k, v in value.items()}
        items = [
            [encode(k, packed, f"{path}: a key", depth + 1), encode(v, packed, f"{path}.{k}", depth + 1)]
            for k, v in value.items()
        ]
        return {TAG: "dict", "items": items}
    return _tagged(value, packed, path)


def _float_name(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _tagged(value: Any, packed: Packed, path: str) -> dict[str, Any]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {TAG: "bytes", **packed.data(bytes(value))}
    if isinstance(value, State):
        return {TAG: "state", "blocks": encode(value.to_json(), packed, path)}
    if isinstance(value, WorldView):
        return {TAG: "world", **_world(value, packed, path)}
    if isinstance(value, HyperLink):
        return {TAG: "link", "value": encode(value.model_dump(mode="json"), packed, path)}
    if isinstance(value, complex):
        return {TAG: "complex", "value": [encode(p, packed, path) for p in (value.real, value.imag)]}
    if isinstance(value, int | float) and not hasattr(value, "dtype"):  # an enum; numpy's float64 has a dtype
        return encode(float(value) if isinstance(value, float) else int(value), packed, path)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return {TAG: "tensor", **packed.data(_tensor_bytes(value, path))}
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        import numpy

        array = numpy.asarray(value)
        if array.dtype.kind not in _ARRAY_KINDS:
            raise PortValueError(f"{path}: an array of {array.dtype} cannot travel; convert it to numbers")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        shape = {"scalar": True} if isinstance(value, numpy.generic) else {"shape": list(array.shape)}
        return {TAG: "array", "dtype": array.dtype.str, **shape, **packed.data(array.tobytes())}
    raise PortValueError(
        f"{path}: {kind_of(value)} cannot travel to another machine; give text, numbers, lists, dicts, bytes, tensors, "
        "arrays, links or a reference instead"
    )


def _tensor_bytes(tensor: Any, path: str) -> bytes:
    from safetensors.torch import save

    try:
        return save({"t": tensor.detach().to("cpu").contiguous()})
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise PortValueError(f"{path}: {kind_of(tensor)} cannot be written as safetensors: {error}") from error


def _world(view: WorldView, packed: Packed, path: str) -> dict[str, Any]:
    if packed.blobs is None:
        raise PortValueError(f"{path}: a view of a world cannot travel this way; only callers hand it over")

    def kept(content: WorldContent) -> str:
        root = content.save(packed.blobs)
        packed.refs[root] = None
        packed.refs.update(dict.fromkeys(part.save(packed.blobs) for _, part in content.parts()))
        return root

    return {"root": kept(view._content), "linked": {name: kept(content) for name, content in view._linked.items()}}


def decode(value: Any, parts: memoryview, path: str = "value", blobs: BlobStore | None = None) -> Any:
    """The value of a JSON tree that `encode` made. Raises: PortValueError naming the place."""
    if isinstance(value, list):
        return [decode(v, parts, f"{path}[{i}]", blobs) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind = value.get(TAG)
    if kind is None:
        return {k: decode(v, parts, f"{path}.{k}", blobs) for k, v in value.items()}
    try:
        return _untagged(str(kind), value, parts, path, blobs)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, PortValueError):
            raise
        raise PortValueError(f"{path}: not a well-formed {kind!r}: {type(error).__name__}: {error}") from None


def _untagged(kind: str, value: dict[str, Any], parts: memoryview, path: str, blobs: BlobStore | None) -> Any:
    if kind == "float":
        return _FLOATS[value["value"]]
    if kind == "tuple":
        return tuple(decode(v, parts, f"{path}[{i}]", blobs) for i, v in enumerate(value["items"]))
    if kind == "dict":
        return {decode(k, parts, path, blobs): decode(v, parts, f"{path}.{k}", blobs) for k, v in value["items"]}
    if kind == "bytes":
        return _bytes(value, parts)
    if kind == "complex":
        return complex(*(decode(v, parts, path, blobs) for v in value["value"]))
    if kind == "link":
        return HyperLink.model_validate(decode(value["value"], parts, path, blobs))
    if kind == "state":
        return State.of(decode(value["blocks"], parts, path, blobs))
    if kind == "tensor":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(_bytes(value, parts))["t"]
        except SafetensorError as error:
            raise ValueError(str(error)) from None
    if kind == "array":
        import numpy

        dtype = numpy.dtype(value["dtype"])
        if dtype.kind not in _ARRAY_KINDS:
            raise ValueError(f"dtype {dtype} is not one of numbers")
        flat = numpy.frombuffer(_bytes(value, parts), dtype).copy()
        return flat[0] if value.get("scalar") else flat.reshape(value["shape"])
    if kind == "world" and blobs is not None:
        linked = {name: WorldContent.load(blobs, root) for name, root in value["linked"].items()}
        return WorldContent.load(blobs, value["root"]).view(linked=linked)
    raise ValueError("this kind is not known here")


def _bytes(value: dict[str, Any], parts: memoryview) -> bytes:
    if "part" in value:
        offset, size = value["part"]
        if type(offset) is not int or type(size) is not int or min(offset, size) < 0 or offset + size > len(parts):
            raise ValueError("its part is not in the body")
        return bytes(parts[offset : offset + size])
    try:
        return base64.b64decode(value["data"], validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def references(value: Any) -> set[str]:
    """The hashes that texts of the form `blob:HASH` name, anywhere in a decoded value."""
    found: set[str] = set()
    waiting = [value]
    while waiting:
        at = waiting.pop()
        if isinstance(at, str):
            if at.startswith("blob:") and is_sha256(at[5:]):
                found.add(at[5:])
        elif isinstance(at, State):
            waiting.append(at.to_json())
        elif isinstance(at, Mapping):
            waiting += at.values()
        elif isinstance(at, (list, tuple)):
            waiting += at
    return found


def read_token(name: str, environment: Mapping[str, str]) -> str:
    """The bearer token in a variable. Raises: MissingCredentialError."""
    token = environment.get(name, "").strip()
    if not token:
        raise MissingCredentialError(f"the environment variable {name} is to hold the token and is not set")
    return token

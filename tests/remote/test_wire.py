"""What travels comes back as it was: each kind of value, with type, shape and dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wg_blocks.wire import INLINE, JSON_TYPE, PARTS_TYPE, Packed, decode, encode, references, unpack
from wg_core import State, WorldContent
from wg_core.errors import PortValueError
from wg_core.execution.blobs import MemoryBlobs
from wg_core.structure.hyperlink import HyperLink


def there_and_back(value: Any) -> Any:
    packed = Packed()
    tree = encode(value, packed)
    kind, pieces = packed.body(tree)
    again, parts = unpack(kind, b"".join(pieces))
    return decode(again, parts)


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, shape and dtype, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


VALUES: dict[str, Any] = {
    "none": None, "true": True, "integer": 2**70, "float": 0.1, "whole_float": 1.0, "minus_zero": -0.0, "nan": math.nan,
    "infinities": [math.inf, -math.inf], "text": "Schöne Insel, 島, \U0001f3dd", "half_surrogate": "\ud800",
    "empty": ["", [], {}, (), b""], "tuple": (1, (2.0, "x")), "nested": {"a": [{"b": None}, {"c": [1, 2.5, False]}]},
    "tag_as_key": {"$wg": "tensor", "data": "no"}, "keys_not_text": {1: "one", (2, 3): "pair", None: 0},
    "bytes": bytes(range(256)), "large_bytes": bytes(range(256)) * 1000, "complex": complex(1, math.inf),
    "link": HyperLink(target_kind="world", target_id="isle", rel="next"),
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "half": torch.tensor([1.5, math.nan], dtype=torch.float16),
    "float64": torch.rand(3, 1, dtype=torch.float64), "int64": torch.tensor([[2**62]]), "bool": torch.tensor([True, False]),
    "uint8": torch.arange(256, dtype=torch.uint8), "scalar_tensor": torch.tensor(3.5), "empty_tensor": torch.zeros(0, 4),
    "not_contiguous": torch.arange(12.0).reshape(3, 4).t(), "large_tensor": torch.rand(1, 3, 64, 64),
    "nested_tensors": {"waveform": torch.rand(2, 100), "rate": 16000, "marks": [torch.tensor(1), {"x": torch.zeros(2)}]},
    "array": np.arange(6, dtype=np.int16).reshape(3, 2), "image": np.random.default_rng(0).random((1, 3, 64, 64), np.float32),
    "array_0d": np.array(2.5), "array_strided": np.arange(20)[::3], "numpy_scalar": np.float32(0.1), "numpy_float": np.float64(0.1),
    "complex_array": np.array([1 + 2j]), "state": State.of({"intent": {"text": "calm"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_it_comes_back_as_it_was(name: str) -> None:
    """proves 02 M-4: every kind, dtype and shape included; NaN and infinities too."""
    assert same(there_and_back(VALUES[name]), VALUES[name])


def test_all_of_them_at_once() -> None:
    assert same(there_and_back(VALUES), VALUES)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN)
def test_any_plain_value_comes_back(value: Any) -> None:
    assert same(there_and_back(value), value)


def test_json_on_the_wire_is_strict_json() -> None:
    """NaN is tagged by name; the text itself has no constant that JSON does not know."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    packed = Packed()
    kind, pieces = packed.body(encode([math.nan, math.inf, "ü"], packed))
    assert kind == JSON_TYPE
    assert json.loads(b"".join(pieces), parse_constant=refuse)[0] == {"$wg": "float", "value": "nan"}


def test_few_bytes_stand_in_the_json_and_many_in_parts() -> None:
    for size, kind in ((INLINE, JSON_TYPE), (INLINE + 1, PARTS_TYPE)):
        packed = Packed()
        assert packed.body(encode(b"x" * size, packed))[0] == kind


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [object()]}, r"value\.a\[0\]: object cannot travel"),
        ({1, 2}, "set cannot travel"),
        (np.array(["a", None], dtype=object), "array of object cannot travel"),
        (torch.eye(3).to_sparse(), "value: Tensor"),
    ],
)  # fmt: skip
def test_what_cannot_travel_is_named(value: Any, message: str) -> None:
    with pytest.raises(PortValueError, match=message):
        encode(value, Packed())


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(PortValueError, match="nested deeper than 64"):
        encode(endless, Packed())


@pytest.mark.parametrize(
    "tree",
    [
        {"$wg": "pickle", "data": ""}, {"$wg": "tensor", "data": "AAAA"}, {"$wg": "bytes", "part": [0, 99]},
        {"$wg": "bytes", "part": [-1, 2]}, {"$wg": "bytes", "data": "!"}, {"$wg": "array", "dtype": "O", "shape": [1], "data": ""},
        {"$wg": "array", "dtype": "<f4", "shape": [9], "data": "AAAA"}, {"$wg": "float", "value": "big"}, {"$wg": ["x"]},
        {"$wg": "world", "root": "0" * 64, "linked": {}}, {"$wg": "state", "blocks": {"intent": 1}},
        {"$wg": "dict", "items": [[[], 1]]}, {"$wg": "tuple"},
    ],
)  # fmt: skip
def test_malformed_objects_are_refused(tree: Any) -> None:
    """Nothing but a PortValueError comes of what a stranger sends."""
    with pytest.raises(PortValueError, match="value"):
        decode(tree, memoryview(b""))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON_TYPE, b"{"), (JSON_TYPE, b"NaN"), (JSON_TYPE, b'{"a":1,"a":2}'), (PARTS_TYPE, b""), ("text/plain", b"{}"),
        (PARTS_TYPE, b"\xff" * 8 + b"{}"), (JSON_TYPE, b"\xff\xfe"), (JSON_TYPE, b"[" * 200_000),
    ],
)  # fmt: skip
def test_bodies_that_are_none(kind: str, body: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack(kind, body)


def test_a_world_travels_by_reference() -> None:
    """proves 03 W-19: its root alone is sent; what it refers to is listed."""
    blobs = MemoryBlobs()
    content = WorldContent.from_seed({"style": "Plain.", "places": [{"id": "cove", "name": "the Cove"}]})
    packed = Packed(blobs)
    tree = encode(content.view(), packed)
    assert len(json.dumps(tree)) < 150 and all(map(blobs.has, packed.refs))
    again = decode(tree, memoryview(b""), blobs=blobs)
    assert again.items("cove") == content.view().items("cove")
    with pytest.raises(PortValueError, match="only callers hand it over"):
        encode(content.view(), Packed())


def test_references_are_found_anywhere() -> None:
    sha = "a" * 64
    assert references({"x": [f"blob:{sha}"], "y": "blob:short"}) == {sha}
    assert references(State.of({"intent": {"text": f"blob:{sha}"}})) == {sha}

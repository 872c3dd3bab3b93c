"""Several edges on one input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wg_core import Port
from wg_core.errors import PortValueError
from wg_core.structure.port import UNSET, aggregate


def feeds(*values: Any) -> list[tuple[str, Any]]:
    return [(f"n{i}:y", v) for i, v in enumerate(values)]


def port(how: str, **more: Any) -> Port:
    return Port("x", "in", aggregation=how, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["single", "concat", "sum", "first", "dict"])
@pytest.mark.parametrize("given", [[], [UNSET], [UNSET, UNSET]])
def test_no_feed_is_unset(how: str, given: list[Any]) -> None:
    """01 F-5, A-4: unset values are skipped; nothing set gives nothing."""
    assert aggregate(port(how), feeds(*given)) is UNSET


@pytest.mark.parametrize("how", ["concat", "sum", "first"])
@pytest.mark.parametrize("value", [None, "a", 3, {"k": 1}, ["a"]])
def test_one_feed_passes_unchanged(how: str, value: Any) -> None:
    """01 F-5, A-4: a single value, also None, passes through."""
    assert aggregate(port(how), feeds(UNSET, value)) is value


@pytest.mark.parametrize(
    ("how", "values", "expected"),
    [
        ("concat", ["a", "b", "c"], "a\nb\nc"),
        ("concat", [[1], [], [2, 3]], [1, 2, 3]),
        ("sum", [1, 2.5, 3], 6.5),
        ("first", [UNSET, "b", "c"], "b"),
        ("first", [1, "b", []], 1),
        ("dict", [1, UNSET, "c"], {"n0:y": 1, "n2:y": "c"}),
        ("dict", [1], {"n0:y": 1}),
    ],
)
def test_three_feeds(how: str, values: list[Any], expected: Any) -> None:
    """01 F-5, A-4, 02 G-17: in edge order, each policy as the table says."""
    assert aggregate(port(how), feeds(*values)) == expected


def test_concat_with_another_separator() -> None:
    """01 F-5: `agg_sep`."""
    assert aggregate(port("concat", agg_sep=", "), feeds("a", "b")) == "a, b"


def test_concat_of_tensors_chooses_its_dimension() -> None:
    """01 F-5: dimension 1 for rank 3 and more, else 0, or `agg_dim`."""
    flat = torch.ones(2, 3)
    assert aggregate(port("concat"), feeds(flat, flat)).shape == (4, 3)
    deep = torch.ones(1, 2, 3, 4)
    assert aggregate(port("concat"), feeds(deep, deep, deep)).shape == (1, 6, 3, 4)
    assert aggregate(port("concat", agg_dim=-1), feeds(deep, deep)).shape == (1, 2, 3, 8)


def test_sum_of_arrays_is_elementwise_and_leaves_the_inputs_alone() -> None:
    """01 F-5, F-12."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert aggregate(port("sum"), feeds(a, b)).tolist() == [11.0, 22.0]
    assert a.tolist() == [1.0, 2.0]
    assert aggregate(port("sum"), feeds(np.array([1]), np.array([2]))).tolist() == [3]


@pytest.mark.parametrize(
    ("how", "values", "says"),
    [
        ("concat", ["a", [1]], "cannot concat these values: n0:y: str of length 1, n1:y: list of length 1"),
        ("concat", [1, 2], "cannot concat these values: n0:y: int, n1:y: int"),
        ("concat", [torch.ones(2), torch.ones(2, 2)], "cannot concat these values"),
        ("concat", [torch.ones(2, 3), torch.ones(2, 4)], r"cannot concat shapes \[2, 3\], \[2, 4\] on dimension 0"),
        ("sum", ["a", "b"], "cannot sum these values: n0:y: str"),
        ("sum", [True, False], "cannot sum these values: n0:y: bool"),
        ("sum", [1, torch.ones(2)], "cannot sum"),
        ("sum", [torch.ones(2), torch.ones(3)], "cannot sum"),
    ],
)
def test_mixed_or_unlisted_kinds_are_refused(how: str, values: list[Any], says: str) -> None:
    """01 F-5, A-2: PortValueError names each source with its kind."""
    with pytest.raises(PortValueError, match=says):
        aggregate(port(how), feeds(*values))

"""Small tools for agents: an echo, and arithmetic that evaluates an expression tree, never code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from wg_core import Port
from wg_core.assembly.roles import Tool
from wg_core.errors import ToolError

MAX_CHARS = 400
MAX_BITS = 256

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NAMES = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "min": min, "max": max, "round": round, "floor": math.floor, "ceil": math.ceil,
    "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "sin": math.sin, "cos": math.cos, "tan": math.tan,
}  # fmt: skip


class Echo(Tool):
    """Gives back what it gets."""

    ports = (Port("value", "in", "text|number|list|dict"), Port("result", "out", "text|number|list|dict"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"result": inputs["value"]}


class Calculator(Tool):
    """Evaluates arithmetic: numbers, + - * / // % **, brackets, pi, e and functions such as sqrt(2) or max(1, 2).

    Raises: ToolError for anything else, for more than 400 characters, and for numbers beyond 256 bits.
    """

    ports = (
        Port("expression", "in", "text", description="arithmetic, for example (2 + 3) * sqrt(16)"),
        Port("result", "out", "number"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"result": calculate(inputs["expression"])}


def calculate(expression: str) -> int | float:
    """The value of an arithmetic expression. Raises: ToolError."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters; at most {MAX_CHARS} are evaluated")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except ToolError:
        raise
    except (SyntaxError, ArithmeticError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot evaluate {expression!r}: {error}") from error


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            if (
                isinstance(left, int)
                and isinstance(right, int)
                and abs(right) * max(left.bit_length(), 1) > 2 * MAX_BITS
            ):
                raise ToolError(f"{left}**{right} has more than {MAX_BITS} bits")
            return _bounded(left**right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        return _bounded(_FUNCTIONS[node.func.id](*[_value(argument) for argument in node.args]))
    raise ToolError(
        f"{ast.unparse(node)[:80]!r} is no arithmetic; allowed are numbers, + - * / // % **, {', '.join((*_NAMES, *_FUNCTIONS))}"
    )


def _bounded(value: Any) -> int | float:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError(f"a number has more than {MAX_BITS} bits")
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ToolError("the result is not a finite real number")
    return value

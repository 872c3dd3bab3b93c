"""Ports: what a block takes and gives, as data beside the code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast

from wg_core.errors import PortError, PortValueError, did_you_mean


class _Unset:
    """The value of what was not given; `None` is a value like any other."""

    _instance: _Unset | None = None

    def __new__(cls) -> _Unset:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False

    def __copy__(self) -> _Unset:
        return self

    def __deepcopy__(self, memo: object) -> _Unset:
        return self


UNSET: Final = _Unset()

Direction = Literal["in", "out"]
Aggregation = Literal["single", "concat", "sum", "first", "dict"]
AGGREGATIONS: Final = ("single", "concat", "sum", "first", "dict")

PORT_PATTERN: Final = r"[a-z][a-z0-9_]*"


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: object) -> bool:
    """A tensor, or any array with shape and dtype (numpy): the array interface of Python."""
    return _is_tensor(value) or (hasattr(value, "__array__") and hasattr(value, "dtype"))


def _is_world(value: object) -> bool:
    return callable(getattr(value, "items", None)) and not isinstance(value, Mapping)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "any": lambda v: True,
    "tensor": _is_array,
    "number": lambda v: isinstance(v, Number) or (_is_array(v) and v.ndim == 0),
    "text": lambda v: (
        isinstance(v, str) or (isinstance(v, list) and all(isinstance(x, str) for x in cast("list[Any]", v)))
    ),
    "list": lambda v: isinstance(v, (list, tuple)),
    "dict": lambda v: isinstance(v, Mapping),
    "image": _is_array,
    "audio": lambda v: isinstance(v, Mapping) and "waveform" in v,
    "video": _is_array,
    "bytes": lambda v: isinstance(v, (bytes, bytearray, memoryview)),
    "ref": lambda v: isinstance(v, (str, Mapping)),
    "link": lambda v: isinstance(v, Mapping) or hasattr(v, "target_kind"),
    "world": _is_world,
}
_SUPERTYPES: dict[str, frozenset[str]] = {name: frozenset({name}) for name in _KINDS}


def port_types() -> tuple[str, ...]:
    """All registered port types."""
    return tuple(_KINDS)


def supertypes(name: str) -> frozenset[str]:
    """The registered types that a type is accepted as, itself among them."""
    return _SUPERTYPES[name]


def register_port_type(name: str, *, subtype_of: str | None = None, check: Callable[[Any], bool] | None = None) -> None:
    """Register a port type; a subtype is accepted wherever its supertype is.

    `check(value) -> bool` tells whether a value is of the kind; by default a subtype checks as its supertype.
    Raises: PortError for a bad or taken name or an unknown supertype.
    """
    if not re.fullmatch(PORT_PATTERN, name):
        raise PortError(f"bad port type name {name!r}: use lower case letters, digits and '_'")
    if subtype_of is not None and subtype_of not in _KINDS:
        raise PortError(f"port type {name!r}: unknown supertype {subtype_of!r}; {did_you_mean(subtype_of, _KINDS)}")
    supertypes = frozenset({name, *(_SUPERTYPES[subtype_of] if subtype_of else ())})
    if name in _KINDS:
        if _SUPERTYPES[name] == supertypes:
            return
        raise PortError(f"port type {name!r} is registered already with other supertypes")
    _KINDS[name] = check or (_KINDS[subtype_of] if subtype_of else _KINDS["any"])
    _SUPERTYPES[name] = supertypes
    _compatible_types.clear()


# Verdicts by the pair of type tuples: few pairs occur, and a graph of a thousand nodes asks for each many times.
_compatible_types: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[bool, bool]] = {}


def _type_verdict(source: tuple[str, ...], target: tuple[str, ...]) -> tuple[bool, bool]:
    key = (source, target)
    verdict = _compatible_types.get(key)
    if verdict is None:
        if "any" in source or "any" in target:
            verdict = (True, False)
        else:
            fits = [bool(_SUPERTYPES[s] & set(target)) for s in source]
            verdict = (any(fits), any(fits) and not all(fits))
        _compatible_types[key] = verdict
    return verdict


@dataclass(frozen=True, slots=True)
class Port:
    """One named input or output of a block.

    `types` is one type name, several joined by `|`, or a sequence of names. `agg_dim` and `agg_sep` belong to
    `concat`: the dimension on which tensors join (default 1 for rank 3 and more, else 0), the text between texts.
    `schema` is a JSON schema (or shape and dtype) of the value; `streamable` outputs may arrive in chunks.

    Raises: PortError.
    """

    name_pattern: ClassVar[str] = PORT_PATTERN

    name: str
    direction: Direction
    types: tuple[str, ...] = ("any",)
    optional: bool = False
    aggregation: Aggregation = "single"
    default: Any = UNSET
    tag: str | None = None
    schema: Any = None
    aliases: tuple[str, ...] = ()
    streamable: bool = False
    description: str = ""
    agg_dim: int | None = None
    agg_sep: str = "\n"

    if TYPE_CHECKING:  # what the constructor accepts; it makes a tuple of `types` and of `aliases`

        def __init__(
            self,
            name: str,
            direction: Direction,
            types: str | Sequence[str] = ("any",),
            optional: bool = False,
            aggregation: Aggregation = "single",
            default: Any = UNSET,
            tag: str | None = None,
            schema: Any = None,
            aliases: Sequence[str] = (),
            streamable: bool = False,
            description: str = "",
            agg_dim: int | None = None,
            agg_sep: str = "\n",
        ) -> None: ...

    def __post_init__(self) -> None:
        given: Any = self.types
        names: tuple[str, ...] = tuple(given.split("|")) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "types", names)
        object.__setattr__(self, "aliases", tuple(self.aliases))
        if not isinstance(cast(Any, self.name), str) or not re.fullmatch(type(self).name_pattern, self.name):
            raise PortError(f"bad port name {self.name!r}: use a lower case letter first, then a-z, 0-9 and '_'")
        if self.direction not in ("in", "out"):
            raise PortError(f"port {self.name!r}: direction is 'in' or 'out', not {self.direction!r}")
        if not names:
            raise PortError(f"port {self.name!r}: no type given; known: {', '.join(_KINDS)}")
        for name in names:
            if name not in _KINDS:
                raise PortError(f"port {self.name!r}: unknown type {name!r}; {did_you_mean(name, _KINDS)}")
        if self.aggregation not in AGGREGATIONS:
            raise PortError(
                f"port {self.name!r}: aggregation {self.aggregation!r} is none of {', '.join(AGGREGATIONS)}"
            )
        if self.direction == "out":
            if self.aggregation != "single":
                raise PortError(f"output port {self.name!r} cannot aggregate; only inputs have {self.aggregation!r}")
            if self.default is not UNSET:
                raise PortError(f"output port {self.name!r} cannot have a default")
        if self.aggregation != "concat" and (self.agg_dim is not None or self.agg_sep != "\n"):
            raise PortError(f"port {self.name!r}: agg_dim and agg_sep belong to 'concat', not to {self.aggregation!r}")

    @property
    def required(self) -> bool:
        """An input that must have a value, or an output that is always set."""
        return not self.optional and self.default is UNSET

    def compatible_with(self, target: Port) -> bool:
        """Whether an edge may lead from this output to the input `target`."""
        return self.direction == "out" and target.direction == "in" and _type_verdict(self.types, target.types)[0]

    def partly_compatible_with(self, target: Port) -> bool:
        """Whether only some of this output's types are accepted by `target` (worth a warning)."""
        return _type_verdict(self.types, target.types)[1]

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of one of this port's kinds."""
        return any(_KINDS[t](value) for t in self.types)


def check_ports(ports: Sequence[Port], owner: str) -> None:
    """Refuse port names (and aliases) that occur twice in one block.

    An alias may be the name of a port of the other direction: who asks says which way.

    Raises: PortError.
    """
    names: dict[str, Port] = {}
    aliases: dict[str, Port] = {}
    for port in ports:
        if port.name in names:
            raise _twice(owner, port.name, names[port.name], port)
        names[port.name] = port
    for port in ports:
        for alias in port.aliases:
            named = names.get(alias)
            other = named if named is not None and named.direction == port.direction else aliases.get(alias)
            if other is not None:
                raise _twice(owner, alias, other, port)
            aliases[alias] = port


def _twice(owner: str, name: str, one: Port, other: Port) -> PortError:
    return PortError(f"{owner}: port name {name!r} occurs twice (ports {one.name!r} and {other.name!r})")


def kind_of(value: Any) -> str:
    """A short word for what a value is, for error messages; never its content."""
    if value is UNSET:
        return "nothing"
    if _is_array(value):
        return f"{type(value).__name__}{list(value.shape)} {value.dtype}"
    if isinstance(value, (str, list, tuple, dict, bytes)):
        return f"{type(cast(Any, value)).__name__} of length {len(cast(Any, value))}"
    return type(value).__name__


def aggregate(port: Port, feeds: Sequence[tuple[str, Any]]) -> Any:
    """Join the values of several edges on one input, in edge order; unset values are skipped.

    `feeds` holds pairs `("node:port" of the source, value)`. Returns UNSET where no value is set.
    `concat` joins tensors on `agg_dim`, chains lists, joins texts with `agg_sep`; `sum` adds elementwise; `first`
    takes the first; `dict` maps "node:port" to value. A single value passes through all but `dict` unchanged.

    Raises: PortValueError for values that the policy cannot join.
    """
    given = [(source, value) for source, value in feeds if value is not UNSET]
    policy = port.aggregation
    if policy == "dict":
        return dict(given) if given else UNSET
    if not given:
        return UNSET
    if len(given) == 1 or policy == "first":
        return given[0][1]
    values: list[Any] = [value for _, value in given]
    if policy == "concat":
        joined = _concat(port, values)
    elif policy == "sum":
        joined = _sum(values)
    else:
        joined = UNSET
    if joined is UNSET:
        kinds = ", ".join(f"{source}: {kind_of(value)}" for source, value in given)
        raise PortValueError(f"port {port.name!r} cannot {policy} these values: {kinds}")
    return joined


def _concat(port: Port, values: list[Any]) -> Any:
    if all(isinstance(v, str) for v in values):
        return port.agg_sep.join(values)
    if all(isinstance(v, list) for v in values):
        return [item for v in values for item in v]
    if all(_is_tensor(v) for v in values):
        ranks = {v.ndim for v in values}
        if len(ranks) == 1 and ranks != {0}:
            dim = port.agg_dim if port.agg_dim is not None else (1 if ranks.pop() >= 3 else 0)
            try:
                return sys.modules["torch"].cat(values, dim=dim)
            except (RuntimeError, IndexError) as error:
                shapes = ", ".join(str(list(v.shape)) for v in values)
                raise PortValueError(f"port {port.name!r} cannot concat shapes {shapes} on dimension {dim}") from error
    return UNSET


def _sum(values: list[Any]) -> Any:
    numbers = all(isinstance(v, Number) for v in values) and not any(isinstance(v, bool) for v in values)
    if not numbers and not all(_is_array(v) for v in values):
        return UNSET
    total = values[0]
    for value in values[1:]:
        try:
            total = total + value
        except (RuntimeError, ValueError, TypeError):
            return UNSET
    return total

"""Every error of the engine: one family, one class for each kind of mistake.

All classes derive from `WGError` and from the builtin that a generic handler would expect.
A message names the place, the two sides and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: near spellings of `name`, else all of `known` (at most twelve)."""
    names = sorted(set(known))
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    if not names:
        return "there are none"
    shown = ", ".join(repr(n) for n in names[:12])
    return f"known: {shown}{', ...' if len(names) > 12 else ''}"


class WGError(Exception):
    """Root of all errors raised by the engine; `code` is that of a validation check, where one found the mistake."""

    code: str = ""

    def __init__(self, *args: object, code: str = "") -> None:
        super().__init__(*args)
        if code:
            self.code = code

    def __str__(self) -> str:  # KeyError would print its message inside quotes
        return Exception.__str__(self)


class PortError(WGError, ValueError):
    """A port is declared wrongly: bad or duplicate name, unknown type, aggregation on an output."""


class UnknownBlockTypeError(WGError, KeyError):
    """A block type, or the requested backend of it, is not registered."""

    code = "UNKNOWN_BLOCK_TYPE"


class DuplicateBlockTypeError(WGError, ValueError):
    """A block type is registered twice with different factories."""


class ConfigError(WGError, ValueError):
    """A configuration is wrong; carries file, line and path where they are known."""


class NodeError(WGError, ValueError):
    """A node id is invalid, taken or unknown, or a node is described in two ways at once."""


class EdgeError(WGError, ValueError):
    """An edge joins what cannot be joined."""


class MissingInputError(WGError, ValueError):
    """A required input was not given."""


class UnexpectedInputError(WGError, ValueError):
    """An input was given that nobody declares."""


class PortValueError(WGError, TypeError):
    """A value on a port is of the wrong kind."""


class OutputContractError(WGError, RuntimeError):
    """A block or stage did not return what it declares."""


class StateDictError(WGError, KeyError):
    """A state dict has missing, unexpected or mis-shaped keys."""


class CheckpointError(WGError, ValueError):
    """A checkpoint cannot be read or belongs to something else."""


class ValidationError(WGError, ValueError):
    """A structure is invalid; `result` holds all issues."""

    def __init__(self, result: Any) -> None:
        super().__init__(str(result))
        self.result = result


class UnknownTemplateError(WGError, KeyError):
    """No template has this name."""


class TemplateParameterError(WGError, TypeError):
    """A template was given an unknown or invalid parameter."""


class MissingCredentialError(WGError, RuntimeError):
    """The environment variable that should hold a provider's key is not set."""


class ApiTimeoutError(WGError, RuntimeError):
    """A provider did not answer in time."""


class ApiRateLimitError(WGError, RuntimeError):
    """A provider refused a call for its rate or quota."""


class BudgetExceededError(WGError, RuntimeError):
    """A call of a model was refused, before it was made: it would exceed the run's budget."""


class ApiResponseError(WGError, RuntimeError):
    """A provider's answer is not a result."""


class AdapterError(WGError, ValueError):
    """A weight adapter cannot be attached to its target."""


class NothingTrainableError(WGError, ValueError):
    """A training has nothing to learn: no parameter was chosen, or the loss depends on none."""


class NotFiniteError(WGError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; names step and parameter."""


class ToolError(WGError, ValueError):
    """A tool cannot be offered or called as asked."""

    code = "AGENT_TOOLS"


class ToolLimitError(ToolError):
    """A tool's argument names a path or host that the tool may not reach, or its limits cannot be held to."""


class ProfilerBusyError(WGError, RuntimeError):
    """A profile was asked for while another one is taken."""


class NodeExecutionError(WGError, RuntimeError):
    """A block failed; names path, iteration and input kinds, with the original error as `__cause__`."""


class RemoteError(NodeExecutionError):
    """What runs behind an endpoint failed or cannot be reached; names node, host and the way out.

    `code` is the server's word for it (or `unreachable`, `timeout`, `too_large`), `status` the HTTP status if any.
    """

    def __init__(self, message: str, *, code: str = "unreachable", status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class AgentStepLimitError(NodeExecutionError):
    """An agent still wanted tools when its steps were used up."""


class AbortRun(WGError):
    """Raised by a hook, or by cancelling, to stop a run cleanly."""


class RunTimeoutError(WGError, TimeoutError):
    """A run took longer than its `timeout`."""


class SnapshotConflictError(WGError, RuntimeError):
    """Another step was published, or another owner holds the world."""


class JointStepError(WGError, RuntimeError):
    """Some of the worlds that made a step together failed: `errors`, and `snapshots` of the others, by world id.

    A failed world gave its lease back, and goes on from the stages that it came to the end of.
    """

    def __init__(
        self, message: str, *, errors: Mapping[str, Exception] | None = None, snapshots: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.errors = dict(errors or {})
        self.snapshots = dict(snapshots or {})


class CorruptSnapshotError(WGError, RuntimeError):
    """Stored bytes do not match their hash."""


class StaleOwnerError(WGError, RuntimeError):
    """The run's owner epoch is no longer the current one: another run took the world over."""


class ReplayError(WGError, LookupError):
    """A step cannot be replayed: it asks for an answer that was not recorded, or its record is not there."""


class EndWorldError(WGError, TypeError):
    """An End World is read, linked and quoted; it was asked to run or to change."""


class LinkError(WGError, LookupError):
    """A link was followed and its target cannot be found."""


class MissingExtraError(WGError, ImportError):
    """An optional package is not installed; the message gives the command that installs it."""


class MissingModelError(WGError, FileNotFoundError):
    """A model is not in the model store; the message gives the command that fetches it."""

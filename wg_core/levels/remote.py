"""Remote: a level that runs elsewhere, known here by its stored contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, cast

from wg_core.assembly.build import Build
from wg_core.assembly.contract import contract_hash, contract_words, filled_requests, spec_of
from wg_core.assembly.models import ContractEntry, EndpointEntry, Placed, RemoteEntry
from wg_core.assembly.registry import BlockRegistry, default_registry
from wg_core.errors import ConfigError
from wg_core.execution.block import check_outputs
from wg_core.execution.context import Frame, RunOptions, add_rows, budget_of
from wg_core.execution.drive import Session
from wg_core.execution.node import Spec
from wg_core.execution.plan import Placeholder, Plan
from wg_core.execution.validate import Issue, ValidationResult
from wg_core.levels.level import Level
from wg_core.state.canonical import sha256_json
from wg_core.structure.port import UNSET


@dataclass(frozen=True, slots=True)
class RemoteCall:
    """One call of a remote level: inputs, the caller's options and frames, and what both sides must agree on.

    `path` is the node's place for messages; `frame` is the level that calls, None where nothing runs around it.
    """

    path: str
    inputs: Mapping[str, Any]
    options: RunOptions
    frame: Frame
    inside: bool
    contract_hash: str
    config_hash: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """Outputs by key, and the model use that they took."""

    outputs: dict[str, Any]
    usage: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, dict[str, float]])


class Transport(Protocol):
    """How a remote level is reached. Raises: RemoteError, ConfigError, AbortRun, RunTimeoutError."""

    def run(self, endpoint: EndpointEntry, call: RemoteCall) -> RemoteAnswer: ...

    def spec(self, endpoint: EndpointEntry, path: str) -> dict[str, Any]: ...


class Remote(Level[Any]):
    """A graph or pipeline behind an endpoint; an executable like any other, without blocks of its own.

    It has no parameters and no gradient comes back through it. Of the options of a run the seed, the numbers of steps,
    `per_node`, `extra`, timeout, cancelling and trace context travel; device, callbacks and training stay here.
    """

    level = kind = "remote"
    allow_cycles = False
    passes_gradient = False

    def __init__(
        self,
        id: str | None = None,
        *,
        endpoint: EndpointEntry | Mapping[str, Any] | str,
        contract: ContractEntry | Mapping[str, Any] | None = None,
        registry: BlockRegistry | None = None,
    ) -> None:
        super().__init__(id)
        given: Any = {"url": endpoint} if isinstance(endpoint, str) else endpoint
        self.endpoint = EndpointEntry.model_validate(given)
        self.contract = None if contract is None else ContractEntry.model_validate(contract)
        self.fetched: ContractEntry | None = None
        self.registry = registry or default_registry()
        self._transport: Transport | None = None

    @property
    def transport(self) -> Transport:
        """What carries the calls. Raises: ConfigError for an unknown name."""
        if self._transport is None:
            self._transport = cast(Transport, self.registry.transport(self.endpoint.transport))
        return self._transport

    def fetch_contract(self) -> ContractEntry:
        """Ask the server for its contract; from now on `validate` compares it with the stored one.

        Raises: RemoteError, ConfigError.
        """
        answer = self.transport.spec(self.endpoint, self.id)
        self.fetched = ContractEntry.model_validate(answer["contract"])
        return self.fetched

    def get_input_spec(self) -> list[Spec]:
        return [spec_of(e) for e in self.contract.inputs] if self.contract else []

    def get_output_spec(self) -> list[Spec]:
        return [spec_of(e) for e in self.contract.outputs] if self.contract else []

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        """Check that a contract is stored and, once one was fetched, that it is the server's. Nothing is contacted."""
        problem = ""
        if self.contract is None:
            problem = "a remote node needs a stored contract: inputs and outputs as the server's /spec gives them"
        elif self.fetched is not None:
            problem = difference(self.contract, self.fetched)
        issues = [Issue("error", "REMOTE_CONTRACT", self.id, problem, "store what /spec answers")] if problem else []
        result = ValidationResult(issues)
        if strict and issues:
            result.raise_errors()
        return result

    def plan(self) -> Plan:
        """The ports as slots; there is no step to see from here. Raises: ValidationError without a contract."""
        stamp = self.stamp()
        if self._plan is None or self._plan.stamp != stamp:
            self.validate()
            slots = {e["key"]: i for i, e in enumerate(self.get_input_spec(), 1)}
            needed = [(e["key"], slots[e["key"]]) for e in self.get_input_spec() if e["required"]]
            self._plan = Plan(stamp, [], [None, *([UNSET] * len(slots))], slots, needed, [], [], [], [])
        return self._plan

    def describe(self) -> str:
        """Where it runs, as the file names it."""
        return f"{self.level} {self.id}: behind {self.endpoint.url or '$' + str(self.endpoint.url_env)}"

    def dry_run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Placeholders by the contract; nobody is called."""
        needed = [e for e in self.get_input_spec() if e["required"]]
        given = {e["key"]: Placeholder(tuple(e["types"]), f"{self.id}.{e['key']}") for e in needed}
        return self.run({**given, **(inputs or {})}, dry_run=True, **options)

    def _session(
        self, plan: Plan, inputs: Mapping[Any, Any], options: RunOptions, parent: Frame | None
    ) -> Session:
        yield from ()  # one call to elsewhere, no node of its own
        values = self._bind(plan, inputs)
        frame = Frame(self.level, self.id, options, parent, tuple(self.hooks))
        frame.emit("run_start")
        ports = self.port_index.outputs
        if options.dry_run:
            outputs: dict[str, Any] = {k: Placeholder(p.types, f"{self.id}.{k}") for k, p in ports.items()}
        else:
            given = {key: values[slot] for key, slot in plan.inputs.items() if values[slot] is not UNSET}
            contract = cast(ContractEntry, self.contract)
            call = RemoteCall(
                frame.path,
                given,
                parent.options if parent is not None else options,
                parent if parent is not None else frame,
                parent is not None,
                contract_hash(contract),
                contract.config_hash,
            )
            budget = budget_of(call.options)
            if budget is not None:
                budget.hold(frame.path, 0).drop()
            answer = self.transport.run(self.endpoint, call)
            outputs = answer.outputs
            check_outputs(frame.path, ports, outputs)
            add_rows(frame.usage, answer.usage)
            if budget is not None:
                for row in answer.usage.values():
                    budget.charge(row)
        frame.emit("run_end", outputs=outputs)
        return outputs

    def remotes(self) -> Iterator[Remote]:
        yield self

    @property
    def request_schema(self) -> Callable[[Mapping[str, Sequence[str]]], dict[str, Any]] | None:
        """The schema of the requests that the server's makers accept, by names; None if it has no makers."""
        stored = self.contract.requests if self.contract else None
        return (lambda names: filled_requests(stored, names)) if stored is not None else None

    @property
    def config_hash(self) -> str:
        """The hash that the contract pins, else one of the contract; where it runs does not count."""
        if self.contract is not None and self.contract.config_hash is not None:
            return self.contract.config_hash
        return sha256_json({"remote": contract_hash(self.contract) if self.contract else None})

    @classmethod
    def from_entry(cls, entry: RemoteEntry, build: Build) -> Self:
        remote = cls(entry.id, endpoint=_endpoint(entry, build), contract=entry.contract, registry=build.registry)
        remote.title = entry.title
        remote.metadata = dict(entry.metadata)
        result = remote.validate(strict=False)
        if not result.is_valid:
            raise build.error(ConfigError(str(result)))
        return remote

    def to_config(self) -> dict[str, Any]:
        head = {"kind": "remote", "schema_version": "1.0", "id": self.id}
        parts = {"title": self.title, "metadata": dict(self.metadata)}
        return {**head, **{k: v for k, v in parts.items() if v}, **self.placed_config()}

    def placed_config(self) -> dict[str, Any]:
        """`endpoint` and `contract` as a node of a pipeline or a stage writes them."""
        config: dict[str, Any] = {"endpoint": self.endpoint.model_dump(mode="json", exclude_defaults=True)}
        if self.contract is not None:
            config["contract"] = contract_words(self.contract)
        return config


def _endpoint(entry: Placed, build: Build) -> EndpointEntry:
    found = entry.place()
    if found is None:
        raise build.error(ConfigError("endpoint is missing: give endpoint: {url: ...} or endpoint_url"))
    return found


def remote_child(node_id: str, entry: Placed, build: Build) -> Remote:
    """The proxy of a node that has an endpoint. Raises: ConfigError with file, line and path."""
    found = RemoteEntry(id=node_id, endpoint=entry.endpoint, endpoint_url=entry.endpoint_url, contract=entry.contract)
    return Remote.from_entry(found, build)


def difference(stored: ContractEntry, fetched: ContractEntry) -> str:
    """What a stored contract and the server's do not agree on; empty if nothing."""
    said: list[str] = []
    for side in ("inputs", "outputs"):
        mine, its = ({e.key: spec_of(e) for e in getattr(c, side)} for c in (stored, fetched))
        said += [f"{side}: the server has no {key!r}" for key in mine.keys() - its.keys()]
        said += [f"{side}: the server has {key!r}, which is not stored" for key in its.keys() - mine.keys()]
    if not said and contract_hash(stored) != contract_hash(fetched):
        said.append("types, defaults or accepted requests differ")
    if stored.config_hash is not None and stored.config_hash != fetched.config_hash:
        said.append(f"the server runs configuration {fetched.config_hash}, stored is {stored.config_hash}")
    return "; ".join(sorted(said))


__all__ = ["Remote", "RemoteAnswer", "RemoteCall", "Transport", "difference", "remote_child"]

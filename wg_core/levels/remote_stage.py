"""A stage behind an endpoint: the state travels whole, as one JSON object, artifacts by reference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from wg_core.assembly.build import Build
from wg_core.assembly.contract import contract_of
from wg_core.assembly.models import ContractEntry, StageEntry
from wg_core.errors import ConfigError, OutputContractError
from wg_core.execution.context import RunOptions
from wg_core.execution.drive import Stepping
from wg_core.execution.node import Spec
from wg_core.execution.validate import ValidationResult
from wg_core.levels.remote import Remote, remote_child
from wg_core.levels.stage import Condition, Stage, StageResult, condition_of, ledger_of, rows_of, usage_since
from wg_core.state.state import State


class RemoteStage(Stage):
    """A stage whose pipelines run elsewhere; the contract over the state is kept here too."""

    def __init__(
        self,
        id: str,
        remote: Remote,
        *,
        role: str | None = None,
        reads: Sequence[str | int] | None = None,
        writes: Sequence[str | int] | None = None,
        execution_condition: Condition | None = None,
    ) -> None:
        super().__init__(id, role=role, reads=reads, writes=writes, execution_condition=execution_condition)
        self.remote = remote
        remote.hooks = self.hooks

    def stepping(
        self, state: State, sources: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Stepping[StageResult], AbstractContextManager[Any], RunOptions]:
        """As `Stage.stepping`. A stage that would not run is not asked; only declared blocks are taken over.

        Raises: RemoteError, OutputContractError.
        """
        return self._asked(state, sources, options), nullcontext(), self._chosen(options)

    def _asked(self, state: State, sources: Mapping[str, Any], options: Mapping[str, Any]) -> Stepping[StageResult]:
        yield from ()  # one call to elsewhere, no node of its own
        reason = self.why_not(state)
        if reason:
            return StageResult(state, False, reason)
        wanted = {e["key"] for e in self.remote.get_input_spec()}
        offered = {"state": state.to_json(), **sources}
        given = {k: v for k, v in offered.items() if k in wanted and v is not None}
        ledger, options = ledger_of(options)
        before = rows_of(ledger)
        started = time.perf_counter()
        after: Any = self.remote.run(given, **options)["state"]
        seconds = time.perf_counter() - started
        if self._chosen(options).dry_run:
            return StageResult(state, True, "", seconds)
        made = after if isinstance(after, State) else State.of(after)
        strange = [b for b in made.to_json() if b not in self.writes and made.get(b) != state.get(b)]
        if strange:
            raise OutputContractError(
                f"stage {self.id!r}: the server changed {', '.join(strange)}; it may write {list(self.writes)}"
            )
        empty = [b for b in self.writes if b not in made.filled_names()]
        if empty:
            raise OutputContractError(
                f"stage {self.id!r} ran but left {', '.join(empty)} empty; it declares writes {list(self.writes)}"
            )
        for block in self.writes:
            state = state.put(block, made.get(block))
        return StageResult(state, True, "", seconds, usage_since(ledger, before))

    def dry_run(self, inputs: Mapping[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        placeholder = self.remote.dry_run(inputs, **options)["state"]
        return {block: placeholder for block in self.writes}

    def validate(
        self, strict: bool = True, *, deep: bool = False, for_training: bool = False
    ) -> ValidationResult:
        return self.remote.validate(strict, deep=deep, for_training=for_training)

    def describe(self) -> str:
        """Where it runs, as the file names it."""
        return f"{self.level} {self.id}\n  {self.remote.describe()}"

    def stamp(self) -> Any:
        return (self.version, self.remote.stamp())

    def input_mapping(self) -> dict[str, str]:
        """Nothing is mapped here; the server's stage has the mapping."""
        return {}

    def output_mapping(self) -> dict[str, str]:
        return {}

    def get_input_spec(self) -> list[Spec]:
        return self.remote.get_input_spec()

    def get_output_spec(self) -> list[Spec]:
        return self.remote.get_output_spec()

    def remotes(self) -> Iterator[Remote]:
        yield self.remote

    @property
    def contract(self) -> ContractEntry | None:
        """What is stored about the server's stage."""
        return self.remote.contract

    @property
    def config_hash(self) -> str:
        return self.remote.config_hash

    def to_config(self) -> dict[str, Any]:
        head = {"kind": "stage", "schema_version": "1.0", "id": self.id}
        return {**head, **self.mapping_config(), **self.remote.placed_config()}

    @classmethod
    def of_entry(cls, entry: StageEntry, build: Build) -> Self:
        """Build from a checked entry that has an endpoint. Raises: ConfigError with file, line and path."""
        id = entry.id or entry.role or "stage"
        remote = remote_child(id, entry, build)
        try:
            made = cls(
                id, remote, role=entry.role, reads=entry.reads, writes=entry.writes, execution_condition=condition_of(entry)
            )
        except ConfigError as error:
            raise build.error(error) from error
        keys = [{e.key for e in getattr(contract_of(remote), side)} for side in ("inputs", "outputs")]
        if "state" not in keys[0] or keys[1] != {"state"} or keys[0] - {"state", "world", "action", "schema"}:
            raise build.error(
                ConfigError(
                    f"stage {id!r}: its contract takes {sorted(keys[0])} and gives {sorted(keys[1])}; a stage takes state "
                    "(and world, action, schema) and gives state: serve a stage, or put the endpoint on a node below"
                )
            )
        return made


__all__ = ["RemoteStage"]

"""A snapshot: one published step of a world, as one immutable document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from wg_core.errors import ConfigError
from wg_core.execution.context import add_rows
from wg_core.state.canonical import plain, sha256_json
from wg_core.state.forms import Sha256, block_name, form_errors
from wg_core.state.state import State
from wg_core.structure.ids import check_id

SCHEMA_VERSION = "1.0"


def _plain(value: Any) -> Any:
    return plain(value, "snapshot")


def _state(value: Any) -> Any:
    if isinstance(value, State):
        return value.to_json()
    if isinstance(value, Mapping):
        return {block_name(b): plain(v, f"state.{b}") for b, v in cast("Mapping[str, Any]", value).items()}
    return value


Plain = Annotated[dict[str, Any], BeforeValidator(_plain)]
StateJson = Annotated[dict[str, Any], BeforeValidator(_state)]
WorldId = Annotated[str, BeforeValidator(lambda value: check_id(value, "world id"))]


class StageRecord(BaseModel):
    """What one stage did in a step: blocks read and written, seconds, and use per model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    ran: bool
    reason: str = ""
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    usage: dict[str, dict[str, int | float]] = {}
    read: list[str] = []
    wrote: list[str] = []


class Origin(BaseModel):
    """The snapshot that a fork began from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    world: WorldId
    step: int = Field(ge=0)
    id: Sha256


class Snapshot(BaseModel):
    """One step: the state it began with, what was applied, what it carries on, and the content's root hash.

    `id` is the same for the same history: the hash of all but `run`, seconds and usage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: str = Field(default=SCHEMA_VERSION, pattern=r"^1\.0$")
    world_id: WorldId
    step: int = Field(ge=0)
    parent: Sha256 | None = None
    origin: Origin | None = None
    given: StateJson = {}
    applied: StateJson | None = None
    carried: StateJson = {}
    dropped: list[str] = []
    content: Sha256
    content_seed: Sha256 | None = None
    stages: list[StageRecord] = []
    config_hash: str = ""
    models: dict[str, str | None] = {}
    seed: int = 0
    action: str | None = None
    run: Plain = {}

    @property
    def id(self) -> str:
        """The sha256 of what the step is, without when and where it ran."""
        value = self.model_dump(mode="json", exclude={"run": True, "stages": {"__all__": {"seconds", "usage"}}})
        return sha256_json(value)

    def to_json(self) -> dict[str, Any]:
        """The document with its `id` and `file_hash`."""
        value = {**self.model_dump(mode="json"), "id": self.id}
        return {**value, "file_hash": sha256_json(value)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Snapshot:
        """The snapshot of `to_json()`. Raises: ConfigError for another form, another id or another file hash."""
        value = dict(data)
        file_hash, id = value.pop("file_hash", None), value.get("id")
        if file_hash != sha256_json(value):
            raise ConfigError("the file hash does not match the document")
        value.pop("id", None)
        try:
            snapshot = cls.model_validate(value)
        except pydantic.ValidationError as error:
            raise ConfigError(form_errors(error, "snapshot")) from None
        if snapshot.id != id:
            raise ConfigError(f"the document says id {id} but has {snapshot.id}")
        return snapshot

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """All artifacts that its states name, by id."""
        found: dict[str, dict[str, Any]] = {}
        for state in (self.given, self.applied or {}, self.carried):
            for items in state.get("artifacts", {}).values():
                found |= {item["id"]: item for item in items}
        return found

    def usage(self) -> dict[str, dict[str, float]]:
        """Model use of all stages together: `{model: {calls, prompt_tokens, completion_tokens, cost?}}`."""
        total: dict[str, dict[str, float]] = {}
        for record in self.stages:
            add_rows(total, record.usage)
        return total

    def calls(self) -> dict[str, str]:
        """Stage -> blob with the model calls that it made in this step."""
        found = self.run.get("calls")
        return {str(k): str(v) for k, v in cast("dict[str, Any]", found).items()} if isinstance(found, dict) else {}

    def diff(self, other: Snapshot) -> dict[str, list[Any]]:
        """The fields of the document, without `run`, that differ: `{field: [mine, theirs]}`."""
        mine, theirs = (s.model_dump(mode="json", exclude={"run"}) for s in (self, other))
        return {key: [mine[key], theirs[key]] for key in mine if mine[key] != theirs[key]}

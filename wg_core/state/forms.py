"""The forms of the five blocks: what a state may hold, as schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import pydantic
from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, model_validator

from wg_core.errors import ConfigError, did_you_mean
from wg_core.state.canonical import canonical_bytes, plain
from wg_core.structure.ids import ID_PATTERN

BLOCKS = ("intent", "generation_config", "artifacts", "descriptions", "outcome")
MAX_BLOCK_BYTES = 8 * 2**20

Text = Annotated[str, StringConstraints(max_length=200_000)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Label = Annotated[str, StringConstraints(max_length=512)]
Slot = Annotated[str, StringConstraints(pattern=rf"^{ID_PATTERN}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
MediaType = Annotated[str, StringConstraints(pattern=r"^[\w!#$&^.+-]+/[\w!#$&^.+-]+( *;.*)?$", max_length=256)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _OpenForm(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class Intent(_Form):
    """What should happen next."""

    text: Text = ""
    focus: list[Name] = Field(default=[], max_length=1000)


class Request(_Form):
    """One thing to make: into which slot, by which maker, with which parameters."""

    id: Name
    slot: Slot
    maker: Name
    params: dict[str, Any] = Field(default={}, max_length=1000)
    seed: Seed | None = None


class GenerationConfig(_Form):
    """How to make the artifacts."""

    requests: list[Request] = Field(default=[], max_length=1000)

    @model_validator(mode="after")
    def _unique(self) -> GenerationConfig:
        ids = [request.id for request in self.requests]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"request ids must differ; given twice: {', '.join(twice)}")
        return self


class MadeBy(_OpenForm):
    """Where an artifact comes from: maker, graph path, model keys, seed, request (index or id)."""

    maker: Label | None = None
    graph: Label | None = None
    models: list[Label] = Field(default=[], max_length=1000)
    seed: Seed | None = None
    request: int | Label | None = None


class Artifact(_OpenForm):
    """A reference to something made: `id` is the sha256 of its bytes in the blob store.

    `width` and `height` are pixels, `duration` seconds, `shape` the sizes of an array.
    """

    id: Sha256
    media_type: MediaType
    slot: Slot
    uri: Annotated[str, StringConstraints(max_length=4096)] = ""
    width: Annotated[int, Field(gt=0)] | None = None
    height: Annotated[int, Field(gt=0)] | None = None
    duration: Annotated[float, Field(ge=0, strict=False)] | None = None
    shape: list[int] | None = Field(default=None, max_length=16)
    made_by: MadeBy = MadeBy()


class Artifacts(RootModel[dict[Slot, Annotated[list[Artifact], Field(max_length=10_000)]]]):
    """What was made, in typed slots."""

    @model_validator(mode="before")
    @classmethod
    def _slots(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        filled: dict[Any, Any] = {}
        for slot, items in cast("dict[Any, Any]", value).items():
            if isinstance(items, list):
                items = [
                    {"slot": slot, **cast("dict[str, Any]", item)} if isinstance(item, dict) else item
                    for item in cast("list[Any]", items)
                ]
            filled[slot] = items
        return filled

    @model_validator(mode="after")
    def _agree(self) -> Artifacts:
        for slot, items in self.root.items():
            for i, item in enumerate(items):
                if item.slot != slot:
                    raise ValueError(f"item {i} under slot '{slot}' names slot '{item.slot}'; put it there")
        return self


class Description(_Form):
    """What is seen in one artifact: prose, and measured facts as data."""

    artifact_id: Name
    text: Text = ""
    facts: dict[str, Any] = Field(default={}, max_length=1000)


class Descriptions(_Form):
    """What is seen in the artifacts."""

    items: list[Description] = Field(default=[], max_length=10_000)


class Change(_Form):
    """One change of the world."""

    op: Literal["add", "update", "retire"]
    kind: Literal["entity", "place", "term", "rule"]
    id: Name
    fields: dict[str, Any] = Field(default={}, max_length=256)


class Outcome(_Form):
    """What really happened: narrative and structured changes."""

    narrative: Text = ""
    changes: list[Change] = Field(default=[], max_length=1000)


FORMS: dict[str, type[BaseModel]] = {
    "intent": Intent,
    "generation_config": GenerationConfig,
    "artifacts": Artifacts,
    "descriptions": Descriptions,
    "outcome": Outcome,
}


def block_name(block: int | str) -> str:
    """The name of a block given by number (1 or "1") or name. Raises: ConfigError."""
    if isinstance(block, str) and block in FORMS:
        return block
    number = int(block) if isinstance(block, str) and block.isascii() and block.isdigit() and len(block) < 4 else block
    if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= len(BLOCKS):
        return BLOCKS[number - 1]
    hint = did_you_mean(block, BLOCKS) if isinstance(block, str) else f"known: {', '.join(BLOCKS)}"
    raise ConfigError(f"no block {block!r} in a state, which has five numbered 1 to 5; {hint}")


class StateSchema:
    """The five forms, each with the extra top-level fields that a world declares: `{block: {field: JSON Schema}}`.

    Raises: ConfigError for an unknown block, a taken field name, or an extension of `artifacts` (use a new slot).
    """

    def __init__(self, extra: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None) -> None:
        self.extra: dict[str, dict[str, Any]] = {}
        for block, fields in (extra or {}).items():
            name = block_name(block)
            if name == "artifacts":
                raise ConfigError("state_schema.artifacts: a new modality is a new slot and needs no declaration")
            declared = cast("dict[str, Any]", plain(dict(fields), f"state_schema.{name}", ordered=True))
            for field, schema in declared.items():
                path = f"state_schema.{name}.{field}"
                if field in FORMS[name].model_fields:
                    raise ConfigError(f"{path}: the block has this field already; choose another name")
                _check_schema(schema, path)
            self.extra[name] = declared

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateSchema) and other.extra == self.extra

    def __hash__(self) -> int:
        return hash(canonical_bytes(self.extra))

    def fields(self, block: int | str) -> frozenset[str] | None:
        """The top-level field names of a block; None for artifacts, whose slots are free. Raises: ConfigError."""
        name = block_name(block)
        if name == "artifacts":
            return None
        return frozenset(FORMS[name].model_fields) | frozenset(self.extra.get(name, {}))

    def json_schema(self, block: int | str) -> dict[str, Any]:
        """The JSON Schema of a block. Raises: ConfigError."""
        name = block_name(block)
        schema = FORMS[name].model_json_schema()
        if name in self.extra:
            schema["properties"] = {**schema.get("properties", {}), **plain(self.extra[name], name, ordered=True)}
        return schema

    def check(self, block: int | str, value: Any) -> Any:
        """`value` in the form of the block, as a plain copy with defaults filled in.

        Raises: ConfigError naming block and field.
        """
        name = block_name(block)
        data = plain(value, f"state.{name}")
        extra: dict[str, Any] = {}
        if isinstance(data, dict):
            fields = cast("dict[str, Any]", data)
            for field, schema in self.extra.get(name, {}).items():
                if field in fields:
                    extra[field] = fields.pop(field)
                    _check_value(extra[field], schema, f"state.{name}.{field}")
        try:
            form = FORMS[name].model_validate(data)
        except pydantic.ValidationError as error:
            raise ConfigError(form_errors(error, f"state.{name}")) from None
        result = {**form.model_dump(mode="json", exclude_none=True), **extra}
        size = len(canonical_bytes(result))
        if size > MAX_BLOCK_BYTES:
            raise ConfigError(
                f"state.{name}: {size} bytes of JSON, more than {MAX_BLOCK_BYTES}; keep large values in the blob store"
            )
        return result


def form_errors(error: pydantic.ValidationError, path: str) -> str:
    """A validation error as one line below `path`, at most five faults."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    shown: list[str] = []
    for fault in faults[:5]:
        place = path
        for part in fault["loc"]:
            place += f"[{part}]" if isinstance(part, int) else f".{part}"
        shown.append(f"{place}: {fault['msg'].removeprefix('Value error, ')}")
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return "; ".join(shown) + more


def _check_schema(schema: Any, path: str) -> None:
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{path}: not a JSON Schema: {error.message[:300]}") from None
    if "$ref" in canonical_bytes(schema).decode():
        raise ConfigError(f"{path}: '$ref' is not allowed here; write the schema out")


def _check_value(value: Any, schema: Any, path: str) -> None:
    import jsonschema

    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        raise ConfigError(f"{path}{error.json_path[1:]}: {error.message[:300]}")


DEFAULT_SCHEMA = StateSchema()


def block_schema(block: int | str) -> dict[str, Any]:
    """The JSON Schema of a block, without any world's extension. Raises: ConfigError."""
    return DEFAULT_SCHEMA.json_schema(block)

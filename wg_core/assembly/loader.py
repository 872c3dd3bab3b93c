"""The one door for configuration text: YAML or JSON, plain data only, with file and line for every error."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel
from pydantic import ValidationError as PydanticError

from wg_core.errors import ConfigError, did_you_mean
from wg_core.structure.ids import safe_path

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 60
MAX_NODES = 200_000
MAX_REF_DEPTH = 20
MAX_REFS = 1000
MAX_BITS = 1024  # what a float can hold

Where = tuple[str | int, ...]
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp")}
_TEXT_FILES = (".txt", ".md")
WORLDS: tuple[Where, ...] = ((), ("execution", "base", "world"))  # where a world may stand; its content is data


# YAML 1.1 takes `1e-4` for text; JSON, and whoever writes it, means a number. Reader and writer agree on it.
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """Reads the numbers that JSON has."""


_CLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _FastLoader(_CLoader):
    """The same in C, some fifty times faster; it refuses characters that JSON writes as two escapes."""


_PAIRS = re.compile(r"\\u[dD][89a-fA-F]")


class Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _FastLoader, Dumper):
    cast(Any, _side).add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def dump_yaml(config: Mapping[str, Any], path: Path | str) -> Path:
    """Write plain data as YAML, in order, readable."""
    target = Path(path)
    text = yaml.dump(dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    target.write_text(text, encoding="utf-8")
    return target


@dataclass(frozen=True, slots=True)
class Ref:
    """Where a value came from: a file, its name where a scheme was resolved, and what was changed in it."""

    file: Path
    name: str | None = None
    overrides: dict[str, Any] | None = None


@dataclass(slots=True)
class Document:
    """Parsed configuration with the place of every value, and the files that parts of it came from."""

    data: Any
    source: str
    places: dict[Where, tuple[str, int]] = field(default_factory=dict[Where, tuple[str, int]])
    refs: dict[Where, Ref] = field(default_factory=dict[Where, Ref])

    def place(self, where: Where) -> str:
        """`file:line` of a value, or of the nearest enclosing one."""
        for end in range(len(where), -1, -1):
            found = self.places.get(where[:end])
            if found:
                return f"{found[0]}:{found[1]}"
        return self.source

    def error(self, where: Where, message: str, code: str = "SCHEMA") -> ConfigError:
        """A ConfigError that begins with file, line and path."""
        path = ".".join(map(str, where))
        return ConfigError(f"{self.place(where)}: {f'{path}: ' if path else ''}{message}", code=code)


def parse(text: str, source: str = "<text>") -> Document:
    """Parse YAML or JSON text into plain data.

    Aliases, tags, duplicate keys, non-text keys, NaN and infinity are refused; size, depth and number of values are
    limited. Dates stay text.

    Raises: ConfigError with file and line.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source}: {len(text)} characters; the limit is {MAX_BYTES}")
    loader: Any = _Loader if _PAIRS.search(text) else _FastLoader
    try:
        _check_events(text, source, loader)
        node = cast(Any, yaml.compose(text, Loader=loader))
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise ConfigError(f"{source}:{line}: not readable as YAML or JSON: half of a surrogate pair is no character") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}{line}: not readable as YAML or JSON: {problem}") from None
    document = Document(None, source)
    document.data = None if node is None else _Builder(document).build(node, ())
    return document


def _check_events(text: str, source: str, loader: Any) -> None:
    depth = documents = 0
    events = cast("Iterable[Any]", yaml.parse(text, Loader=loader))
    for count, event in enumerate(events, 1):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{source}:{line}: anchors and aliases are not allowed; write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None and not isinstance(event, yaml.DocumentStartEvent):
            raise ConfigError(f"{source}:{line}: tag {str(tag)[:60]!r} is not allowed; configuration is plain data")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ConfigError(f"{source}:{line}: a second document begins here; one file holds one document")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{source}:{line}: nested deeper than {MAX_DEPTH}")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        if count > MAX_NODES:
            raise ConfigError(f"{source}:{line}: more than {MAX_NODES} values")


class _Builder:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.scalars = _Loader("")

    def build(self, node: Any, where: Where) -> Any:
        document = self.document
        document.places.setdefault(where, (document.source, node.start_mark.line + 1))
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in cast("list[tuple[Any, Any]]", node.value):
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConfigError(f"{document.source}:{line}: a key must be text")
                key = key_node.value
                if key_node.tag.endswith(":merge"):
                    raise ConfigError(
                        f"{document.source}:{line}: merge keys ('<<') are not allowed; write the values out"
                    )
                if key in mapping:
                    raise ConfigError(
                        f"{document.source}:{line}: {'.'.join(map(str, (*where, key)))}: this key occurs twice"
                    )
                document.places[(*where, key)] = (document.source, line)
                mapping[key] = self.build(value_node, (*where, key))
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*where, i)) for i, item in enumerate(cast("list[Any]", node.value))]
        if node.tag not in _PLAIN:
            raise document.error(where, f"value of kind {node.tag.rsplit(':', 1)[-1]!r} is not plain data")
        if node.tag.endswith(":timestamp"):
            return node.value
        try:
            value = cast(Any, self.scalars.construct_object(node))
        except (ValueError, OverflowError) as error:
            raise document.error(where, f"unreadable value: {error}") from None
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise document.error(where, f"unreadable value: a whole number of more than {MAX_BITS} bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise document.error(where, "NaN and infinity are not allowed")
        if isinstance(value, str):
            try:  # JSON writes characters beyond 16 bits as two escapes
                return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise document.error(where, "half of a surrogate pair is no character") from None
        return value


_schemes: dict[str, Callable[[str], Path]] = {}


def register_ref_scheme(scheme: str, resolve: Callable[[str], Path]) -> None:
    """Let refs of the form `scheme:...` name files: `resolve(ref)` gives the path, or raises LookupError. None are built in.

    Raises: ConfigError for a scheme that is no word, or is resolved by something else.
    """
    if not re.fullmatch(r"[a-z][a-z0-9+-]+", scheme):
        raise ConfigError(f"a scheme of refs is a word in small letters, not {scheme!r}")
    if _schemes.setdefault(scheme, resolve) is not resolve:
        raise ConfigError(f"refs {scheme}:... are resolved by {_schemes[scheme]!r} already; choose another scheme")


def read(
    path: Path | str, *, root: Path | None = None, refs: bool = True, allow_outside_root: bool = False
) -> Document:
    """Parse a file; `{ref: other_file, overrides: {...}}` is replaced by that file's content.

    References are relative to the file that makes them and stay inside `root` (default: the folder of `path`), unless
    `allow_outside_root`. A `.txt` or `.md` file gives its text. Mappings below `content` are data, never references.

    Raises: FileNotFoundError, ConfigError (unreadable, reference outside the root, missing or cyclic).
    """
    file = Path(path)
    document = parse(_text(file), str(file))
    if refs:
        _Refs(document, None if allow_outside_root else (root or file.parent).resolve()).expand(file.resolve())
        document.refs[()] = Ref(file.resolve())
    return document


def _text(file: Path) -> str:
    """What a file of text says. Raises: FileNotFoundError, ConfigError for anything else."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{file} is {'a folder' if file.is_dir() else 'no plain file'}; name a file")
    if found.st_size > MAX_BYTES:
        raise ConfigError(f"{file}: {found.st_size} bytes; the limit is {MAX_BYTES}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error}") from None


class _Refs:
    def __init__(self, document: Document, root: Path | None) -> None:
        self.document = document
        self.root = root
        self.count = 0

    def error(self, where: Where, message: str) -> ConfigError:
        return self.document.error(where, message, "BAD_REF")

    def _file(self, name: Any, where: Where, here: Path) -> tuple[Path, str | None]:
        """The file that a ref names, and the ref itself where a scheme resolved it."""
        scheme, colon, _ = str(name).partition(":")
        if not isinstance(name, str) or "\0" in name or (colon and scheme not in _schemes):
            known = f"; schemes known here: {', '.join(sorted(_schemes))}" if _schemes else ""
            raise self.error((*where, "ref"), f"ref is the path of a file, not {name!r}{known}")
        if colon:
            try:
                return _schemes[scheme](name).resolve(), name
            except LookupError as error:
                raise self.error((*where, "ref"), f"{name!r} is not found: {error}") from error
        target = (here / name).resolve()
        if self.root is not None:
            try:
                safe_path(self.root, str(target))
            except ConfigError as error:
                if target.is_relative_to(self.root):
                    raise self.error((*where, "ref"), str(error)) from None
                raise self.error(
                    (*where, "ref"),
                    f"{name!r} leaves the folder {str(self.root)!r}; refs stay inside it, unless allow_outside_root is given",
                ) from None
        return target, None

    def expand(self, file: Path) -> None:
        self.document.data = self._walk(self.document.data, (), [file])

    def _walk(self, value: Any, where: Where, files: list[Path]) -> Any:
        if isinstance(value, dict):
            mapping = cast("dict[str, Any]", value)
            if "ref" in mapping and mapping.keys() <= {"ref", "overrides"}:
                return self._load(mapping, where, files)
            return {
                k: v if k == "content" and where in WORLDS else self._walk(v, (*where, k), files)
                for k, v in mapping.items()
            }
        if isinstance(value, list):
            return [self._walk(v, (*where, i), files) for i, v in enumerate(cast("list[Any]", value))]
        return value

    def _load(self, mapping: Mapping[str, Any], where: Where, files: list[Path]) -> Any:
        document = self.document
        name = mapping["ref"]
        target, resolved = self._file(name, where, files[-1].parent)
        if target in files:
            cycle = " -> ".join(f.name for f in [*files[files.index(target) :], target])
            raise self.error((*where, "ref"), f"references go in a cycle: {cycle}")
        if len(files) > MAX_REF_DEPTH:
            raise self.error((*where, "ref"), f"references nested deeper than {MAX_REF_DEPTH}")
        self.count += 1
        if self.count > MAX_REFS:
            raise self.error((*where, "ref"), f"more than {MAX_REFS} references, counting those in referred files")
        if not target.is_file():
            raise self.error((*where, "ref"), f"there is no file {name!r} (looked for {target})")
        if target.suffix in _TEXT_FILES:
            if "overrides" in mapping:
                raise self.error((*where, "overrides"), f"{name!r} is text; only mappings take overrides")
            try:
                text = _text(target)
            except ConfigError as error:
                raise self.error((*where, "ref"), str(error)) from None
            document.refs[where] = Ref(target, resolved)
            return text
        below = read(target, refs=False)
        for path, place in below.places.items():
            document.places[(*where, *path)] = place
        data = self._walk(below.data, where, [*files, target])
        overrides = self._walk(mapping.get("overrides"), (*where, "overrides"), files)
        for path in [p for p in document.places if p[: len(where) + 1] == (*where, "overrides")]:
            if path[len(where) + 1 :]:
                document.places[(*where, *path[len(where) + 1 :])] = document.places[path]
        document.refs[where] = Ref(target, resolved, overrides)
        return data if overrides is None else self._override(data, overrides, where)

    def _override(self, data: Any, overrides: Any, where: Where) -> Any:
        if not isinstance(data, dict) or not isinstance(overrides, dict):
            raise self.error((*where, "overrides"), "overrides and the file they change are mappings")
        merged = dict(cast("dict[str, Any]", data))
        for key, value in cast("dict[str, Any]", overrides).items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = self._override(merged[key], value, (*where, key)) if both else value
        return merged


def checked(model: type[BaseModel], document: Document) -> Any:
    """Validate a document against its schema.

    Raises: ConfigError naming file, line, path and every problem (at most ten).
    """
    if not isinstance(document.data, dict):
        raise document.error((), f"a mapping is needed here, not {type(document.data).__name__}")
    try:
        return model.model_validate(document.data)
    except PydanticError as error:
        problems = [_problem(model, document, e) for e in error.errors(include_url=False)[:10]]
        raise ConfigError("\n".join(problems), code="SCHEMA") from None


def _problem(model: type[BaseModel], document: Document, error: Any) -> str:
    where: Where = tuple(error["loc"])
    message: str = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key {where[-1]!r}; {did_you_mean(str(where[-1]), _fields(model, where[:-1]))}"
    elif error["type"] == "missing":
        message = f"key {where[-1]!r} is missing"
        where = where[:-1]
    else:
        shown = repr(error.get("input"))
        message = f"{message} (got {shown if len(shown) <= 60 else shown[:57] + '...'})"
    return str(document.error(where, message))


def _fields(model: type[BaseModel], where: Where) -> list[str]:
    """Field names (as written in a file) of the model found at `where`."""
    current: Any = model
    for part in where:
        if isinstance(part, int):
            continue
        fields = getattr(current, "model_fields", {})
        match = next((f for n, f in fields.items() if (f.alias or n) == part), None)
        if match is None:
            continue
        current = _inner_model(match.annotation) or current
    return [f.alias or n for n, f in getattr(current, "model_fields", {}).items()]


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    arguments: tuple[Any, ...] = getattr(cast(Any, annotation), "__args__", ())
    for argument in arguments:
        found = _inner_model(argument)
        if found is not None:
            return found
    return None

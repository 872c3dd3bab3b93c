"""What a tool may reach: the folders and hosts that an agent's arguments may name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

from wg_core.errors import ToolLimitError
from wg_core.structure.port import Port

PATHS = ("path", "file-path", "directory-path")  # as pydantic writes Path, FilePath and DirectoryPath
URL = "uri"
LIMITED = (*PATHS, URL)
_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+([/?#][!-\[\]-~]*)?", re.IGNORECASE)  # no user, backslash, blank or control
HOST = r"(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?"


@dataclass(frozen=True, slots=True)
class Reach:
    """Folders (`roots`) and `hosts` that arguments may name, and `places`: argument -> (format, whether it is a list).

    A relative root counts from the working folder. A host is `name`, `*.name` for all below it, or either with `:port`;
    without one the port of the scheme is meant.
    """

    places: Mapping[str, tuple[str, bool]]
    roots: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def confined(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, with paths whole and without links, and URLs as they were read.

        Raises: ToolLimitError for what lies outside, naming the argument.
        """
        out = dict(arguments)
        for name, (form, listed) in self.places.items():
            given: Any = out.get(name)
            if given is None:
                continue
            if not listed:
                out[name] = self._held(name, form, given)
            elif isinstance(given, (list, tuple)):
                out[name] = [self._held(name, form, v) for v in cast("Sequence[Any]", given)]
            else:
                raise ToolLimitError(f"{name} is a list of {form}, not {type(given).__name__}")
        return out

    def _held(self, name: str, form: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ToolLimitError(f"{name} is a {form}, which is a text, not {type(value).__name__}")
        return self._url(name, value) if form == URL else self._path(name, form, value)

    def _path(self, name: str, form: str, value: str) -> str:
        shown = f"{name}: {value[:200]!r}"
        try:
            roots = [Path(root).resolve(strict=True) for root in self.roots]
        except (OSError, RuntimeError) as error:
            raise ToolLimitError(f"a folder that this tool may reach is not there: {', '.join(self.roots)}") from error
        try:
            found = roots[0].joinpath(value).resolve() if roots else None
            there = {"file-path": Path.is_file, "directory-path": Path.is_dir}.get(form)
            missing = found is not None and there is not None and not there(found)
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte, a name that is too long
            raise ToolLimitError(f"{shown} is no path that can be followed") from error
        if found is None or not any(found.is_relative_to(root) for root in roots):
            raise ToolLimitError(f"{shown} is outside of the folders that this tool may reach; name a path inside")
        if missing:
            raise ToolLimitError(f"{shown}: there is no such {form.removesuffix('-path')}")
        return str(found)

    def _url(self, name: str, value: str) -> str:
        shown = f"{name}: {value[:200]!r}"
        if not _URL.fullmatch(value):
            raise ToolLimitError(f"{shown} is no plain http(s)://host[:port]/path")
        try:
            parts = urlsplit(value)
            host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS[parts.scheme]
        except ValueError as error:
            raise ToolLimitError(f"{shown} is no URL") from error
        if not any(_matches(allowed, parts.scheme, host, port) for allowed in self.hosts):
            raise ToolLimitError(f"{shown}: this tool may not reach {host}:{port}; hosts: {', '.join(self.hosts) or 'none'}")
        where = f"[{host}]" if ":" in host else host
        return urlunsplit((parts.scheme, where if port == _PORTS[parts.scheme] else f"{where}:{port}", *parts[2:]))


def _matches(allowed: str, scheme: str, host: str, port: int) -> bool:
    name, colon, wanted = allowed.rpartition(":") if re.search(r":[0-9]+$", allowed) else (allowed, "", "")
    if port != (int(wanted) if colon else _PORTS[scheme]):
        return False
    name = name.strip("[]")
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def places(parameters: Mapping[str, Any], inputs: Mapping[str, Port]) -> dict[str, tuple[str, bool]]:
    """The arguments that name paths or URLs, by their schema or that of the input, as `Reach` takes them.

    Raises: ToolLimitError where such a format stands deeper than an argument or its items, where it could not be held to.
    """
    found: dict[str, tuple[str, bool]] = {}
    for name, schema in cast("Mapping[str, Any]", parameters.get("properties", {})).items():
        for given in (schema, inputs[name].schema if name in inputs else None):
            words, items = _words(given), _words(_words(given).get("items"))
            for form, listed in ((words.get("format"), False), (items.get("format"), True)):
                if form in LIMITED:
                    found.setdefault(name, (cast(str, form), listed))
            if _formats([v for k, v in words.items() if k not in ("format", "items")]) or _formats([*items.values()]):
                raise ToolLimitError(f"{name}: a path or URL is an argument or an item of one; deeper its format cannot be held to")
    if _formats([v for k, v in parameters.items() if k != "properties"]):
        raise ToolLimitError(f"the formats {', '.join(LIMITED)} belong into properties")
    return found


def _words(schema: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", schema) if isinstance(schema, Mapping) else {}


def _formats(value: Any) -> bool:
    """Whether a schema, or any within, has the format of a path or URL."""
    if isinstance(value, Mapping):
        mapping = cast("Mapping[str, Any]", value)
        return mapping.get("format") in LIMITED or any(map(_formats, mapping.values()))
    return isinstance(value, (list, tuple)) and any(map(_formats, cast("Sequence[Any]", value)))

"""Templates: named functions that give the configuration of a level."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from wg_core.errors import DuplicateBlockTypeError, TemplateParameterError, UnknownTemplateError, did_you_mean

_log = logging.getLogger("wg_core.templates")
Builder = Callable[..., dict[str, Any]]


class TemplateRegistry:
    """Templates of each level, by name; those of installed packages come by the entry point `wg.templates`."""

    def __init__(self, *, plugins: bool = False) -> None:
        self._builders: dict[tuple[str, str], Builder] = {}
        self._pending_plugins = plugins
        self.broken_plugins: dict[str, str] = {}

    def register(self, kind: str, name: str, builder: Builder) -> None:
        """Raises: DuplicateBlockTypeError for a taken name."""
        if self._builders.setdefault((kind, name), builder) is not builder:
            raise DuplicateBlockTypeError(f"there is a {kind} template {name!r} already")

    def list(self, kind: str) -> dict[str, dict[str, Any]]:
        """Names with their parameters and defaults."""
        self._load_plugins()
        return {n: _parameters(b) for (k, n), b in sorted(self._builders.items()) if k == kind}

    def build(self, kind: str, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration that a template gives.

        Raises: UnknownTemplateError, TemplateParameterError.
        """
        self._load_plugins()
        builder = self._builders.get((kind, name))
        if builder is None:
            raise UnknownTemplateError(
                f"no {kind} template {name!r}; {did_you_mean(name, [n for k, n in self._builders if k == kind])}"
            )
        known = _parameters(builder)
        for key in parameters:
            if key not in known:
                raise TemplateParameterError(f"template {name!r} has no parameter {key!r}; {did_you_mean(key, known)}")
        missing = [k for k, default in known.items() if default is inspect.Parameter.empty and k not in parameters]
        if missing:
            raise TemplateParameterError(f"template {name!r} needs {', '.join(map(repr, missing))}")
        return builder(**parameters)

    def _load_plugins(self) -> None:
        if self._pending_plugins:
            self._pending_plugins = False
            for point in entry_points(group="wg.templates"):
                try:
                    point.load()(self)
                except Exception as error:  # a broken plugin must not take the others down
                    self.broken_plugins[point.name] = f"{type(error).__name__}: {error}"
                    _log.warning("plugin %r of %s is broken and left out: %s", point.name, point.value, error)


def _parameters(builder: Builder) -> dict[str, Any]:
    return {n: p.default for n, p in inspect.signature(builder).parameters.items()}


_default = TemplateRegistry(plugins=True)


def default_templates() -> TemplateRegistry:
    """The process-wide templates."""
    return _default

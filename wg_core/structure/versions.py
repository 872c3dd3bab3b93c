"""Versions of what is written to files: an older minor is migrated step by step, another major is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

VERSION_PATTERN = r"[0-9]{1,6}\.[0-9]{1,6}"
Migration = Callable[[dict[str, Any]], dict[str, Any]]


def _parts(version: str) -> tuple[int, int]:
    if not re.fullmatch(VERSION_PATTERN, version):
        raise ValueError(f"a version is 'major.minor', not {version!r}")
    major, minor = version.split(".")
    return int(major), int(minor)


class Format:
    """One written format: its current version, and how files of older minors become current ones."""

    def __init__(self, name: str, current: str) -> None:
        self.name = name
        self.current = current
        self._now = _parts(current)
        self._steps: dict[str, tuple[str, Migration]] = {}

    def migration(self, old: str, new: str) -> Callable[[Migration], Migration]:
        """Decorator: a function from the data of version `old` to that of `new`, both of the current major.

        Raises: ValueError for versions in the wrong order, beyond the current one, or an `old` that has a step already.
        """
        if not (_parts(old) < _parts(new) <= self._now and _parts(old)[0] == self._now[0]):
            raise ValueError(f"{self.name}: no step leads from {old} to {new}; the current version is {self.current}")
        if old in self._steps:
            raise ValueError(f"{self.name}: version {old} is migrated to {self._steps[old][0]} already")

        def register(function: Migration) -> Migration:
            self._steps[old] = (new, function)
            return function

        return register

    @property
    def has_steps(self) -> bool:
        """Whether any version is migrated."""
        return bool(self._steps)

    def problem(self, version: object) -> str:
        """Why a file of `version` cannot be read; empty if it can."""
        if not isinstance(version, str) or not re.fullmatch(VERSION_PATTERN, version):
            return f"schema_version is 'major.minor', not {version!r}"
        if _parts(version)[0] > self._now[0]:
            return f"this {self.name} has schema version {version}, this engine reads {self.current}; use a newer engine"
        if _parts(version)[0] < self._now[0]:
            return f"this {self.name} has schema version {version}, this engine reads {self.current}; write it anew"
        return ""

    def migrates(self, version: object) -> bool:
        """Whether there is a step that leads on from `version`."""
        return version in self._steps

    def upgrade(self, data: Mapping[str, Any], version: str) -> dict[str, Any]:
        """`data` of `version` as data of the newest version that registered steps lead to; the input is not changed."""
        made = copy.deepcopy(dict(data)) if self.migrates(version) else dict(data)
        while self.migrates(version):
            version, function = self._steps[version]
            made = {**function(made), "schema_version": version}
        return made

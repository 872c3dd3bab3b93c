"""Model refs: one line of text that says which file of which package is meant."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from wg_core.errors import ConfigError, did_you_mean

FORMS = {
    "pypi": "pypi:NAME==VERSION/FILE#sha256=HEX",
    "npm": "npm:NAME@VERSION/FILE#sha256=HEX",
    "hf": "hf:OWNER/NAME[@REVISION]",
    "file": "file:PATH",
}
_PART = r"[A-Za-z0-9_][A-Za-z0-9._+ -]*"
_PATHS = rf"{_PART}(?:/{_PART})*"
_BODIES = {
    "pypi": re.compile(
        rf"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[0-9][0-9A-Za-z.!+_-]*)/(?P<member>{_PATHS})"
    ),
    "npm": re.compile(
        rf"(?P<package>(?:@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*)@(?P<version>[0-9][0-9A-Za-z.+-]*)/(?P<member>{_PATHS})"
    ),
    "hf": re.compile(r"(?P<package>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<version>[A-Za-z0-9][\w.-]*))?"),
    "file": re.compile(r"(?P<member>[^\0#]+)"),
}
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Ref:
    """A parsed model ref.

    `package` and `version` are empty for `file:`, `member` (a path inside the package, or the end of one) for `hf:`.
    """

    scheme: str
    package: str
    version: str
    member: str
    sha256: str | None = None

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Read a ref of one of the forms in `FORMS`.

        Raises: ConfigError.
        """
        body, _, pin = text.partition("#")
        scheme, colon, rest = body.partition(":")
        if not colon or scheme not in _BODIES:
            raise ConfigError(
                f"unknown model ref {text[:120]!r}: {did_you_mean(scheme, FORMS)}; forms: {', '.join(FORMS.values())}"
            )
        match = _BODIES[scheme].fullmatch(rest)
        if match is None or (".." in rest.split("/") and scheme != "file"):
            raise ConfigError(f"bad model ref {text[:120]!r}: the form is {FORMS[scheme]}")
        sha256 = None
        if pin:
            sha256 = pin.removeprefix("sha256=")
            if not pin.startswith("sha256=") or not _HEX.fullmatch(sha256):
                raise ConfigError(f"bad model ref {text[:120]!r}: after '#' comes sha256= and 64 hex digits")
        found = match.groupdict(default="")
        return cls(scheme, found.get("package", ""), found.get("version", ""), found.get("member", ""), sha256)

    @property
    def folder(self) -> str:
        """A readable and unique folder name for this ref."""
        key = f"{self.scheme}:{self.package}@{self.version}/{self.member}#{self.sha256 or ''}"
        words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.scheme}-{self.package}-{self.version}").strip("-.")
        return f"{words[:60]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

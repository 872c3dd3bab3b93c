"""Ids, and the one door from ids to paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

from wg_core.errors import ConfigError

ID_PATTERN = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
MAX_NAME = 255  # bytes of one name in a path, as most file systems have it
_ID = re.compile(ID_PATTERN)


def check_id(value: object, what: str = "id") -> str:
    """Return `value` if it is a legal id (letter or underscore, then letters, digits, underscores; at most 64).

    Raises: ConfigError.
    """
    if isinstance(value, str) and _ID.fullmatch(value):
        return value
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    raise ConfigError(
        f"bad {what} {shown}: use a letter or '_' first, then letters, digits and '_', at most 64 characters",
        code="BAD_ID" if not isinstance(value, str) or value.strip() else "BLANK_FIELD",
    )


def safe_path(root: Path, *parts: str) -> Path:
    """Join `parts` below `root`; the result (links resolved) lies inside `root`.

    Raises: ConfigError if it would leave `root`, or no file can have this name.
    """
    base = root.resolve()
    try:
        path = base.joinpath(*parts).resolve()
        if any(len(os.fsencode(name)) > MAX_NAME for name in path.parts):
            raise ValueError(f"a name of more than {MAX_NAME} bytes")
    except (ValueError, OSError) as error:
        shown = "/".join(map(str, parts))
        raise ConfigError(f"path {shown[:80]!r} is that of no file: {error}") from None
    if path != base and base not in path.parents:
        raise ConfigError(f"path {'/'.join(parts)!r} leaves its root folder {str(base)!r}")
    return path

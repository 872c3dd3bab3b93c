"""Where the engine keeps what it makes."""

from __future__ import annotations

import os
from pathlib import Path

from wg_core.errors import ConfigError


def home() -> Path:
    """The engine's home folder: `WG_HOME`, else `.wg` in the working folder. Raises: ConfigError if a file is there."""
    path = Path(os.environ.get("WG_HOME") or ".wg").absolute()
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    if not there.is_dir():
        raise ConfigError(f"WG_HOME is {str(path)!r}, but {str(there)!r} is no folder; let WG_HOME name one")
    return path

"""Where the engine keeps what it makes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The engine's home folder: `WG_HOME`, else `.wg` in the working folder."""
    return Path(os.environ.get("WG_HOME") or ".wg").absolute()

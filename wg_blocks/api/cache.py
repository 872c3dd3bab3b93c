"""Answers of earlier requests: kept by the whole request, and given again without asking."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from wg_core.state.files import write_file
from wg_core.state.home import home

_log = logging.getLogger("wg_blocks.api")

FOLDER = "api_cache"

T = TypeVar("T")


class ResponseCache:
    """A folder of answers, `<2 digits>/<sha256 of the request>.json`, each with its request.

    Requests and answers are plain JSON; no key is part of either, as providers take it out of what they hand on. A file
    that cannot be read is asked for anew.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else home() / FOLDER

    def get(self, request: Mapping[str, Any], read: Callable[[Any], T]) -> T | None:
        """The kept answer as `read` makes it of JSON, None where there is none."""
        path = self._path(request)
        try:
            kept = json.loads(path.read_bytes())
            if kept["request"] == json.loads(_text(request)):
                return read(kept["answer"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        _log.warning("the kept answer %s cannot be read and is asked for anew", path)
        return None

    def put(self, request: Mapping[str, Any], answer: Any) -> None:
        write_file(self._path(request), _text({"request": dict(request), "answer": answer}).encode())

    def _path(self, request: Mapping[str, Any]) -> Path:
        sha = hashlib.sha256(_text(request).encode()).hexdigest()
        return self.folder / sha[:2] / f"{sha}.json"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)

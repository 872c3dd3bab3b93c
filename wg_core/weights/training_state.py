"""Where a training stands, on the disk: written whole or not at all, read back to the very same next step.

`training_state/` holds files of tensors named by their content, and `state.json`, which names those that count with
their hashes; a kill at any instant leaves the former `state.json` with its files, or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from wg_core.errors import CheckpointError, ConfigError
from wg_core.state.canonical import parse_json
from wg_core.state.files import TEMP_PREFIX, make_folder, sync_folder, write_file
from wg_core.structure.ids import safe_path
from wg_core.structure.port import kind_of
from wg_core.weights.backends import get_backend, read_tensors
from wg_core.weights.checkpoint import file_hash
from wg_core.weights.tree import is_tensor

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "training_state"
INDEX = "state.json"
FORMAT = "wg-training-state"
VERSION = "1.0"


def write_state(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write JSON `data` and named sets of tensors into `folder`, in place of what is there."""
    make_folder(folder)
    files: dict[str, Any] = {}
    for name, named in tensors.items():
        temp = folder / f"{TEMP_PREFIX}{secrets.token_hex(6)}"
        try:
            get_backend("safetensors").write(temp, {k: v.detach().cpu().contiguous().clone() for k, v in named.items()})
            with open(temp, "rb") as handle:
                os.fsync(handle.fileno())
            sha = file_hash(temp)
            os.replace(temp, folder / f"{name}-{sha[:16]}.safetensors")
        finally:
            temp.unlink(missing_ok=True)
        files[name] = {"file": f"{name}-{sha[:16]}.safetensors", "sha256": sha}
    sync_folder(folder)
    index = {"format": FORMAT, "schema_version": VERSION, **data, "files": files}
    write_file(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False, allow_nan=False).encode("utf-8"))
    kept = {entry["file"] for entry in files.values()}
    for old in folder.glob("*.safetensors"):
        if old.name not in kept:
            old.unlink()
    for left in folder.glob(f"{TEMP_PREFIX}*"):
        left.unlink()


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """What `write_state` wrote last, None where nothing is.

    Raises: CheckpointError for what is unreadable, of another version, or does not match its hash.
    """
    if not (folder / INDEX).is_file():
        return None
    try:
        data: Any = parse_json((folder / INDEX).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{folder / INDEX} is not readable: {error}; remove the folder to begin anew") from error
    if not isinstance(data, dict) or cast("dict[str, Any]", data).get("format") != FORMAT:
        raise CheckpointError(f"{folder / INDEX} is no training state of this engine")
    found = cast("dict[str, Any]", data)
    if str(found.get("schema_version")).partition(".")[0] != VERSION.partition(".")[0]:
        raise CheckpointError(f"{folder} has version {found.get('schema_version')}, this engine reads {VERSION}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, entry in found["files"].items():
        file = safe_path(folder, entry["file"])
        if not file.is_file() or file_hash(file) != entry["sha256"]:
            raise CheckpointError(f"{file} does not match its hash; it was changed or cut off")
        tensors[name] = read_tensors(file, "safetensors")
    return found, tensors


def fingerprint(*tables: Sequence[Any]) -> str:
    """Sha256 of examples: plain data, tensors, arrays, and what turns into plain data (models, dataclasses, states).

    Raises: ConfigError for anything else, naming the example.
    """
    digest = hashlib.sha256()
    for table in tables:
        digest.update(b"table\n")
        for i in range(len(table)):
            _feed(digest, table[i], f"example {i}")
    return digest.hexdigest()


def _feed(digest: Any, value: Any, place: str) -> None:
    if is_tensor(value) or hasattr(value, "__array_interface__"):
        import torch

        tensor: Tensor = torch.as_tensor(value).detach().cpu().contiguous()
        digest.update(f"tensor {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
    elif isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        digest.update(f"map {len(items)}\n".encode())
        for key in sorted(items, key=str):
            digest.update(f"{key!r}\n".encode())
            _feed(digest, items[key], f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        entries = cast("Iterable[Any]", value)
        digest.update(f"list {len(value)}\n".encode())  # type: ignore[arg-type]
        for i, item in enumerate(entries):
            _feed(digest, item, f"{place}[{i}]")
    elif isinstance(value, BaseModel):
        _feed(digest, value.model_dump(mode="json"), place)
    elif hasattr(value, "to_json"):
        _feed(digest, value.to_json(), place)
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, asdict(value), place)
    else:
        raise ConfigError(f"{place} is {kind_of(value)}, which has no fingerprint; give plain data or tensors")

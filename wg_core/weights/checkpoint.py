"""Checkpoints: the state of each block once, in a flat store, and an index that leads from paths to blocks.

A checkpoint is a folder (`dir`) or the same folder as one zip file (`archive`): `index.json`, and in `blocks/` one file
of tensors and one JSON file of other values for each block that has such state. One of a smaller `scope` says in the
index what it lacks. Of weights that are no longer what their reference names the index says a `weights_revision`, a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel
from pydantic import ValidationError as PydanticError

from wg_core.errors import CheckpointError, ConfigError
from wg_core.execution.block import Block
from wg_core.state.canonical import read_mapping, sha256_json
from wg_core.state.files import TEMP_PREFIX, make_folder, sync_folder, write_file
from wg_core.structure.ids import safe_path
from wg_core.structure.port import kind_of
from wg_core.structure.versions import Format
from wg_core.weights.archive import pack_folder, unpack
from wg_core.weights.backends import get_backend, read_tensors
from wg_core.weights.module import ModuleBlock, state_hash
from wg_core.weights.scope import Keep, everything
from wg_core.weights.tree import Paths, is_tensor, unique

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "wg-checkpoint"
CHECKPOINT = Format("checkpoint", "1.1")
FORMATS = ("dir", "archive")
INDEX = "index.json"
ROOT = "block"  # the path of a block that is saved by itself
LIBRARIES = ("generative-worlds", "torch", "safetensors")


@CHECKPOINT.migration("1.0", "1.1")
def _scope(index: dict[str, Any]) -> dict[str, Any]:
    """Before there were scopes, every checkpoint was whole."""
    return {**index, "scope": "all", "lacks": {}}


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    paths: Paths,
    target: Path | str,
    *,
    kind: str,
    format: str = "dir",
    backend: str = "safetensors",
    scope: str = "all",
    keep: Keep = everything,
) -> Path:
    """Write the state of all blocks at `paths` to `target`, which is afterwards whole or as it was.

    Of the state of each block `keep` chooses what is stored, under the name `scope`; the index lists what is left out.

    Raises: CheckpointError for an unknown format or backend, state that is neither tensor nor JSON, and a `target`
    that holds something else.
    """
    if format not in FORMATS:
        raise CheckpointError(f"checkpoint format {format!r} is none of {', '.join(FORMATS)}")
    get_backend(backend)
    place = Path(target)
    make_folder(place.parent)
    temp = place.parent / f"{TEMP_PREFIX}{secrets.token_hex(6)}"
    try:
        _write_folder(temp, list(paths), {"kind": kind, "scope": scope}, backend, keep)
        if format == "dir":
            put_folder(temp, place, INDEX)
        elif place.is_dir():
            raise CheckpointError(f"{place} is a folder; give a file name for an archive")
        else:
            pack_folder(temp, place)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return place


def put_folder(temp: Path, target: Path, mark: str) -> None:
    """Let the finished folder `temp` take the place of `target`, which must be absent, empty or hold a file `mark`.

    Raises: CheckpointError.
    """
    old: Path | None = None
    if target.exists():
        if not target.is_dir() or (any(target.iterdir()) and not (target / mark).is_file()):
            raise CheckpointError(f"{target} exists and holds something else (no {mark}); choose another place")
        old = target.parent / f"{TEMP_PREFIX}old-{target.name}-{secrets.token_hex(4)}"
        os.rename(target, old)
    try:
        os.rename(temp, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _write_folder(
    folder: Path, paths: list[tuple[str, Block]], words: Mapping[str, str], backend: str, keep: Keep
) -> None:
    make_folder(folder / "blocks")
    keys: dict[int, str] = {}
    blocks: dict[str, Any] = {}
    lacks: dict[str, list[str]] = {}
    revisions: dict[str, Any] = {}
    for path, block in unique(paths).items():
        whole = block.own_state_dict()
        state = keep(block, whole)
        if len(state) < len(whole):
            lacks[path] = [k for k in whole if k not in state]
            if lost := _written_over(block, {k: whole[k] for k in lacks[path]}):
                revisions[path] = {"names": list(lost), "sha256": state_hash(lost)}
        if state:
            key = _block_key(path, block, blocks)
            blocks[key] = _write_block(folder, key, path, block, state, backend)
            keys[id(block)] = key
    index = {
        "format": FORMAT,
        "schema_version": CHECKPOINT.current,
        **words,
        "backend": backend,
        "libraries": libraries(),
        "lacks": lacks,
        "weights_revisions": revisions,
        "paths": {path: keys[id(block)] for path, block in paths if id(block) in keys},
        "blocks": blocks,
    }
    write_file(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode("utf-8"))


def _written_over(block: Block, left: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is left out of a block's state the weights that its reference no longer names."""
    if not isinstance(block, ModuleBlock) or block.model_ref() is None:
        return {}
    written = block.written()
    return {name: value for name, value in left.items() if is_tensor(value) and value.data_ptr() in written}


def libraries() -> dict[str, str | None]:
    """The versions of the libraries that decide what weights mean; None where one is not installed."""

    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: found(name) for name in LIBRARIES}


def _block_key(path: str, block: Block, taken: Iterable[str]) -> str:
    """A file name for a block: its model reference (else path) made safe, and a short hash of the whole identity."""
    reference = block.model_ref()
    for shown, identity in ((reference[2], reference) if reference else (path, (path,)), (path, (path, "by path"))):
        clean = re.sub(r"[^A-Za-z0-9_.-]+", "_", shown)[-60:].strip("._-") or "block"
        key = f"{clean}-{hashlib.sha256(chr(31).join(identity).encode()).hexdigest()[:10]}"
        if key not in taken:
            return key
    raise CheckpointError(f"two blocks at path {path!r}")  # paths are unique, so this is a programming error


def _write_block(
    folder: Path, key: str, path: str, block: Block, state: Mapping[str, Any], backend: str
) -> dict[str, Any]:
    tensors, aliases, values = _split(path, state)
    reference = block.model_ref()
    entry: dict[str, Any] = {"block_type": block.block_type, "class": type(block).__name__}
    if reference is not None:
        entry["base_ref"] = list(reference)
    if tensors:
        file = folder / "blocks" / f"{key}{get_backend(backend).suffix}"
        try:
            get_backend(backend).write(file, tensors)
        except Exception as error:
            raise CheckpointError(f"{path}: the {backend} backend cannot write its tensors: {error}") from error
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        entry["tensors"] = {"file": f"blocks/{file.name}", "sha256": file_hash(file), "aliases": aliases}
    if values:
        file = folder / "blocks" / f"{key}.json"
        write_file(file, json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8"))
        entry["values"] = {"file": f"blocks/{file.name}", "sha256": file_hash(file)}
    if reference is not None:
        entry["weights_revision"] = _content_hash(entry) if block.weights_changed() else None
    return entry


def _content_hash(entry: Mapping[str, Any]) -> str:
    return sha256_json([entry[part]["sha256"] for part in ("tensors", "values") if part in entry])


def _split(path: str, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Tensors that share no memory and lie contiguous, names of equal ones, and the JSON values."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    values: dict[str, Any] = {}
    same: dict[tuple[Any, ...], str] = {}
    stores: set[int] = set()
    for key, value in state.items():
        if not is_tensor(value):
            try:
                values[key] = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{path}: its state {key!r} is {kind_of(value)}, neither tensor nor JSON: {error}"
                ) from None
            if values[key] != value and not isinstance(value, tuple):
                raise CheckpointError(
                    f"{path}: its state {key!r} does not come back equal from JSON (keys must be texts)"
                )
            continue
        tensor = cast("Tensor", value).detach()
        if tensor.is_meta or tensor.is_sparse:
            raise CheckpointError(f"{path}: its tensor {key!r} has no dense data; load or densify it first")
        if tensor.numel():
            identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))
            if identity in same:
                aliases[key] = same[identity]
                continue
            same[identity] = key
        whole = tensor.cpu().contiguous()
        store = whole.untyped_storage()
        if store.data_ptr() in stores or store.nbytes() != whole.numel() * whole.element_size():
            whole = whole.clone()
        stores.add(whole.untyped_storage().data_ptr())
        tensors[key] = whole
    return tensors, aliases, values


def file_hash(path: Path) -> str:
    """Sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


class _File(BaseModel):
    file: str
    sha256: str


class _Tensors(_File):
    aliases: dict[str, str] = {}


class _Entry(BaseModel):
    """What is stored for a block; a part that it has not is absent."""

    tensors: _Tensors = cast(Any, None)
    values: _File = cast(Any, None)


class _Index(BaseModel):
    """What every index of a checkpoint holds."""

    paths: dict[str, str]
    blocks: dict[str, _Entry]
    lacks: dict[str, list[str]]


@dataclass(slots=True)
class Store:
    """An opened checkpoint: reads the state of one block key at a time, checked."""

    folder: Path
    source: Path
    index: dict[str, Any]
    verify: bool
    _read: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    @property
    def paths(self) -> dict[str, str]:
        """Node path -> block key."""
        return self.index["paths"]

    @property
    def lacks(self) -> dict[str, list[str]]:
        """Node path -> the keys of its state that a smaller scope left out."""
        return self.index["lacks"]

    def content_hash(self, key: str) -> str:
        """The sha256 of what is stored for a block key, hex."""
        return _content_hash(self.index["blocks"][key])

    @property
    def revisions(self) -> dict[str, dict[str, Any]]:
        """Node path -> names and hash of weights that were left out although their reference does not name them."""
        return self.index.get("weights_revisions", {})

    def state(self, key: str) -> dict[str, Any]:
        """The stored state of a block key. Raises: CheckpointError."""
        if key not in self._read:
            entry = self.index["blocks"].get(key)
            if not isinstance(entry, dict):
                raise CheckpointError(f"{self.source}: its index names block {key!r} but does not hold it")
            self._read[key] = self._state(cast("dict[str, Any]", entry))
        return self._read[key]

    def _state(self, entry: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if "values" in entry:
            state.update(read_mapping(self._file(entry["values"]), CheckpointError))
        if "tensors" in entry:
            tensors = read_tensors(self._file(entry["tensors"]), self.index["backend"])
            state.update(tensors)
            for alias, name in entry["tensors"].get("aliases", {}).items():
                if name not in tensors:
                    raise CheckpointError(f"{self.source}: {alias!r} stands for {name!r}, which is not there")
                state[alias] = tensors[name]
        return state

    def _file(self, entry: dict[str, Any]) -> Path:
        try:
            path = safe_path(self.folder, *str(entry["file"]).split("/"))
        except ConfigError as error:
            raise CheckpointError(f"{self.source}: {error}") from error
        if not path.is_file():
            raise CheckpointError(f"{self.source}: its file {entry['file']!r} is missing; the checkpoint is not whole")
        if self.verify and file_hash(path) != entry["sha256"]:
            raise CheckpointError(
                f"{self.source}: {entry['file']!r} does not match its hash; it was changed or cut off"
            )
        return path


@contextmanager
def open_folder(source: Path, mark: str) -> Generator[Path]:
    """The folder that `source` is, or an unpacked copy of the archive that it is.

    Raises: FileNotFoundError, CheckpointError for anything without a file `mark`.
    """
    if not source.exists():
        left = (
            sorted(p.name for p in source.parent.glob(f"{TEMP_PREFIX}old-{source.name}-*"))
            if source.parent.is_dir()
            else []
        )
        hint = f"; an interrupted save left the former one in {left[0]!r} beside it: rename that" if left else ""
        raise FileNotFoundError(f"no checkpoint at {source}{hint}")
    if source.is_dir():
        if not (source / mark).is_file():
            raise CheckpointError(f"{source} is no checkpoint: it has no {mark}")
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="wg-checkpoint-") as temp:
        unpack(source, Path(temp))
        if not (Path(temp) / mark).is_file():
            raise CheckpointError(f"{source} is no checkpoint: it has no {mark}")
        yield Path(temp)


@contextmanager
def opened(source: Path | str, verify: bool) -> Generator[Store]:
    """A checkpoint to read from, its index checked and brought to the current version. Raises: CheckpointError."""
    place = Path(source)
    with open_folder(place, INDEX) as folder:
        index = read_mapping(folder / INDEX, CheckpointError)
        if index.get("format") != FORMAT:
            raise CheckpointError(f"{place} is no checkpoint of this engine (format {index.get('format')!r})")
        version = index.get("schema_version")
        problem = CHECKPOINT.problem(version)
        if problem:
            raise CheckpointError(f"{place}: {problem}", code="VERSION")
        index = CHECKPOINT.upgrade(index, str(version))
        try:
            _Index.model_validate(index)
        except PydanticError as error:
            at = ".".join(map(str, error.errors()[0]["loc"]))
            raise CheckpointError(f"{place}: its index has no {at} that can be read; the checkpoint is not whole") from None
        get_backend(str(index.get("backend")))
        yield Store(folder, place, index, verify)


def read_state(source: Path) -> dict[str, Any]:
    """The state dict in a plain file of tensors, or in the checkpoint of one block.

    Raises: FileNotFoundError, CheckpointError.
    """
    if source.is_file() and source.suffix not in (".zip", ".wgz"):
        return dict(read_tensors(source))
    with opened(source, True) as store:
        state: dict[str, Any] = {}
        for path, key in store.paths.items():
            if path != ROOT and not path.startswith(f"{ROOT}."):
                raise CheckpointError(f"{source} is the checkpoint of a {store.index.get('kind')}, not of one block")
            prefix = path.removeprefix(ROOT).removeprefix(".")
            state.update({f"{prefix}.{k}" if prefix else k: v for k, v in store.state(key).items()})
        return state

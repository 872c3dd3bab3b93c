"""A level as a folder: its configuration, its checkpoint, and a manifest that says what they are and hashes them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wg_core.assembly.loader import Ref, Where, dump_yaml
from wg_core.assembly.models import SCHEMA_VERSION
from wg_core.assembly.pool import ModelPool
from wg_core.assembly.registry import BlockRegistry, refuse_secrets
from wg_core.errors import CheckpointError, ConfigError
from wg_core.state.canonical import parse_json, sha256_json
from wg_core.state.files import TEMP_PREFIX, make_folder, write_file
from wg_core.structure.ids import safe_path
from wg_core.structure.versions import Format
from wg_core.weights.checkpoint import CHECKPOINT, INDEX, file_hash, libraries, open_folder, put_folder

if TYPE_CHECKING:
    from wg_core.levels.written import Written

MANIFEST = "manifest.json"
SAVED = Format("saved level", "1.0")
REFS = ("inline", "keep", "extract")
CHECKPOINTS = {"dir": "checkpoint", "archive": "checkpoint.zip"}
_CONFIG, _PARTS = "config.yaml", "parts"


@dataclass(frozen=True, slots=True)
class Origins:
    """The files that a level was built from, by place in its configuration (its own at the empty place)."""

    refs: Mapping[Where, Ref]
    registry: BlockRegistry


# ---- writing -----------------------------------------------------------------------------------------------------------


def write_saved(
    level: Written, target: Path, *, format: str, backend: str, refs: str, training: Mapping[str, Any] | None
) -> Path:
    """Write `level` as the folder `target`, which is afterwards whole or as it was. Raises: as `Written.save`."""
    if format not in CHECKPOINTS:
        raise CheckpointError(f"checkpoint format {format!r} is none of {', '.join(CHECKPOINTS)}")
    if refs not in REFS:
        raise ConfigError(f"refs is one of {', '.join(REFS)}, not {refs!r}")
    make_folder(target.parent)
    temp = target.parent / f"{TEMP_PREFIX}{secrets.token_hex(6)}"
    try:
        make_folder(temp)
        config, files, kept = level.to_config(), dict[str, Any](), dict[str, str]()
        if refs == "extract":
            config, files = _extracted(level.kind, config)
        elif refs == "keep":
            config, kept = _kept(level, config, temp)
        for name, part in files.items():
            make_folder(temp / _PARTS)
            _flush(dump_yaml(part, temp / name))
        path = _flush(dump_yaml(config, temp / _CONFIG))
        if kept:
            _compare(level, path)
        checkpoint = level.save_checkpoint(temp / CHECKPOINTS[format], format=format, backend=backend)
        manifest = {
            "kind": level.kind,
            "saved_version": SAVED.current,
            "schema_version": SCHEMA_VERSION,
            "checkpoint_version": CHECKPOINT.current,
            "contract_hash": _contract_hash(level),
            "libraries": libraries(),
            "config": {
                "file": _CONFIG,
                "sha256": file_hash(path),
                "parts": {name: file_hash(temp / name) for name in files},
                "refs": kept,
            },
            "checkpoint": {
                "file": checkpoint.name,
                "sha256": file_hash(checkpoint / INDEX if format == "dir" else checkpoint),
            },
            **({"training": _plain(training)} if training is not None else {}),
        }
        write_file(temp / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8"))
        put_folder(temp, target, MANIFEST)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return target


def _flush(path: Path) -> Path:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path


def _plain(training: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(training), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the training configuration is not plain JSON data: {error}") from None
    refuse_secrets(plain, "the training configuration")
    return plain


def _contract_hash(level: Any) -> str | None:
    """The hash of the external ports, for levels that have some."""
    found = getattr(level, "contract_hash", None)
    return found() if found is not None else None


def _extracted(kind: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration with each level below as a ref, and those levels by file name; equal ones are one file."""
    files: dict[str, Any] = {}
    names: dict[str, str] = {}

    def ref(kind: str, part: dict[str, Any], id: str, folder: str) -> dict[str, str]:
        whole = {"kind": kind, "schema_version": SCHEMA_VERSION, **walk(kind, part, "")}
        same = sha256_json(whole)
        if same not in names:
            name, n = f"{kind}_{part.get('id', id)}", 1
            while f"{_PARTS}/{name}.yaml" in files:
                n += 1
                name = f"{kind}_{part.get('id', id)}_{n}"
            names[same] = f"{name}.yaml"
            files[f"{_PARTS}/{name}.yaml"] = whole
        return {"ref": f"{folder}{names[same]}"}

    def walk(kind: str, data: dict[str, Any], folder: str) -> dict[str, Any]:
        made = dict(data)
        below = {"pipeline": "graph", "stage": "pipeline"}.get(kind)
        if below is not None and "nodes" in made:
            made["nodes"] = [
                {**node, "config": ref(below, node["config"], node["node_id"], folder)} if "config" in node else node
                for node in cast("list[dict[str, Any]]", made["nodes"])
            ]
        if kind == "stage" and "graph" in made:
            made["graph"] = ref("graph", made["graph"], "graph", folder)
        if kind == "world":
            stages = cast("dict[str, Any]", made["execution"]["stages"])
            extracted = {role: ref("stage", stage, role, folder) for role, stage in stages.items()}
            made["execution"] = {**made["execution"], "stages": extracted}
        return made

    return walk(kind, config, f"{_PARTS}/"), files


def _refs_of(level: Any) -> Iterator[tuple[Where, Ref]]:
    """The refs of the files that a level and the levels below it were built from, by place in its configuration."""
    if level.origins is not None:
        yield from level.origins.refs.items()
    for where, child in level.parts():
        for place, ref in _refs_of(child):
            yield (*where, *place), ref


def _kept(level: Written, config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration with refs in the places that had them, and the hashes of the files by their refs."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    kept: dict[str, str] = {}
    done: list[Where] = [()]
    for where, ref in sorted(_refs_of(level), key=lambda pair: len(pair[0])):
        if not where or any(where[: len(d)] == d for d in done[1:]):
            continue
        name = ref.name or Path(os.path.relpath(ref.file, folder.resolve())).as_posix()
        at: Any = made
        try:
            for part in where[:-1]:
                at = at[part]
            at[where[-1]]  # must be there
        except (KeyError, IndexError, TypeError):
            shown = ".".join(map(str, where))
            raise ConfigError(
                f"{level.kind}: {shown} came from {name!r} and is no place of its configuration any more; "
                "save with refs='inline' or 'extract'"
            ) from None
        at[where[-1]] = {"ref": name, **({"overrides": ref.overrides} if ref.overrides else {})}
        kept[name] = file_hash(ref.file)
        done.append(where)
    if not kept:
        raise ConfigError(f"{level.kind}: it was built from no file with refs, so there are none to keep; save with refs='inline'")
    return made, kept


def _compare(level: Written, path: Path) -> None:
    """Raises: ConfigError if what was written with refs says something else than the level is now."""
    registry = level.origins.registry if level.origins is not None else None
    again = type(level).from_yaml(path, registry=registry, pool=ModelPool(), allow_outside_root=True)
    place = _differs(level.to_config(), again.to_config(), ())
    if place is not None:
        raise ConfigError(
            f"{level.kind}: {'.'.join(map(str, place))} is not what the file that it came from says, which was changed "
            "since, here or there; save with refs='inline' or 'extract'"
        )


def _differs(a: Any, b: Any, where: Where) -> Where | None:
    if isinstance(a, dict) and isinstance(b, dict):
        one, two = cast("dict[str, Any]", a), cast("dict[str, Any]", b)
        pairs = [(k, one.get(k), two.get(k)) for k in dict.fromkeys([*one, *two])]
    elif isinstance(a, list) and isinstance(b, list) and len(cast("list[Any]", a)) == len(cast("list[Any]", b)):
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(cast("list[Any]", a), cast("list[Any]", b), strict=True))]
    else:
        return None if a == b else where
    return next((found for k, x, y in pairs if (found := _differs(x, y, (*where, k))) is not None), None)


# ---- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved level: where its parts lie, and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]
    config: Path
    checkpoint: Path

    def check_contract(self, built: Any) -> None:
        """Raises: CheckpointError if what was built has other external ports than what was saved."""
        stored = self.manifest.get("contract_hash")
        if stored is not None and _contract_hash(built) != stored:
            raise CheckpointError(
                f"{self.folder}: its blocks have other ports here than where it was saved (libraries then: "
                f"{self.manifest.get('libraries')}); use the same version of them, or verify=False if that is meant"
            )


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """What a saved level says about itself: kind, versions, contract hash, libraries, hashes, training configuration.

    Raises: FileNotFoundError, CheckpointError.
    """
    with open_folder(Path(folder), MANIFEST) as root:
        return _manifest(root, Path(folder))


def _manifest(root: Path, source: Path) -> dict[str, Any]:
    try:
        found: Any = parse_json((root / MANIFEST).read_bytes())
        version = found.get("saved_version", "1.0")
        words = [found[part][key] for part in ("config", "checkpoint") for key in ("file", "sha256")]
        words += [w for key in ("parts", "refs") for pair in found["config"].get(key, {}).items() for w in pair]
    except (ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{source}: its {MANIFEST} is no readable manifest; the folder is not whole") from None
    problem = SAVED.problem(version)
    if problem or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{source}: {problem or 'its manifest names no files'}", code="VERSION" if problem else "")
    return SAVED.upgrade(found, version)


@contextmanager
def reading(folder: Path, kind: str, verify: bool) -> Generator[Saved]:
    """A saved level of `kind`, every file of it compared with its hash if `verify`.

    Raises: FileNotFoundError, CheckpointError.
    """
    with open_folder(folder, MANIFEST) as root:
        manifest = _manifest(root, folder)
        if manifest.get("kind") != kind:
            raise CheckpointError(f"{folder} holds a {manifest.get('kind')}, not a {kind}")
        try:
            config, checkpoint = (safe_path(root, manifest[part]["file"]) for part in ("config", "checkpoint"))
            hashed = {config: manifest["config"]["sha256"]}
            hashed[checkpoint / INDEX if checkpoint.is_dir() else checkpoint] = manifest["checkpoint"]["sha256"]
            hashed |= {safe_path(root, n): sha for n, sha in manifest["config"].get("parts", {}).items()}
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        hashed |= {config.parent / n: sha for n, sha in manifest["config"].get("refs", {}).items() if ":" not in n}
        for path, sha in hashed.items() if verify else ():
            if not path.is_file() or file_hash(path) != sha:
                raise CheckpointError(f"{folder}: {path.name} does not match its hash; it was changed or cut off")
        yield Saved(folder, manifest, config, checkpoint)


__all__ = ["MANIFEST", "Origins", "read_manifest", "reading", "write_saved"]

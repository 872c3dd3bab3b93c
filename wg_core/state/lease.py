"""Who may write a world: a lease in a file, under a lock of the operating system."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as FormError

from wg_core.errors import ConfigError, CorruptSnapshotError, SnapshotConflictError, StaleOwnerError
from wg_core.state.canonical import canonical_bytes, parse_json, sha256_json
from wg_core.state.files import make_folder, write_file

DEFAULT_TTL_S = 600.0
LOCK_WAIT_S = 30.0


class Lease(BaseModel):
    """The last owner of a world; `epoch` grows with every owner and never returns. Times are seconds since 1970."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    epoch: int
    owner: str | None
    host: str
    boot: str
    pid: int
    process_start: str
    expires_at: float

    def mine(self) -> bool:
        """Whether this very process took it."""
        return (self.host, self.boot, self.pid, self.process_start) == _process()

    def live(self) -> bool:
        """Whether its owner may still be writing: not given back, not expired, and not known to be dead."""
        if self.owner is None or time.time() >= self.expires_at:
            return False
        here = (self.host, self.boot) == _process()[:2]
        return not here or process_start(self.pid) == self.process_start


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the folder's lock; the operating system frees it when the process dies.

    Raises: SnapshotConflictError if another process keeps it for 30 s.
    """
    make_folder(folder)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise SnapshotConflictError(
                        f"{folder / 'lock'} is held by another process for {LOCK_WAIT_S:.0f} s "
                        "(stopped while publishing?); continue or end that process"
                    ) from None
                time.sleep(0.002)
        yield
    finally:
        os.close(handle)


def read_lease(folder: Path) -> Lease | None:
    """The lease in a world's folder, None before the first. Raises: CorruptSnapshotError."""
    path = folder / "lease.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = cast("dict[str, Any]", parse_json(data))
        if value.pop("sha256") != sha256_json(value):
            raise ValueError("its hash differs")
        return Lease.model_validate(value)
    except (ValueError, TypeError, KeyError, AttributeError, FormError) as error:
        raise CorruptSnapshotError(
            f"{path} is corrupt ({error}); restore it, or end every run of this world and remove it"
        ) from None


def acquire(folder: Path, owner: str, ttl_s: float) -> int:
    """Take the lease under the lock and give its epoch; the same owner in the same process gets its own again.

    Raises: SnapshotConflictError while another owner lives.
    """
    if not owner or ttl_s <= 0:
        raise ConfigError(f"a lease needs an owner's name and a time to live above 0, not {owner!r} and {ttl_s}")
    with locked(folder):
        lease = read_lease(folder)
        if lease is not None and lease.live():
            if not (lease.owner == owner and lease.mine()):
                raise SnapshotConflictError(
                    f"world {folder.name!r} is being written by {lease.owner!r} (process {lease.pid} on {lease.host}, "
                    f"epoch {lease.epoch}); wait for it or end it: its lease is free when it dies, at the latest in "
                    f"{lease.expires_at - time.time():.0f} s"
                )
            epoch = lease.epoch
        else:
            epoch = lease.epoch + 1 if lease is not None else 1
        _write(folder, epoch, owner, ttl_s)
        return epoch


def renew(folder: Path, epoch: int, ttl_s: float) -> None:
    """Prolong the lease of `epoch`. Raises: StaleOwnerError if it is no longer current or was given back."""
    with locked(folder):
        lease = check_epoch(folder, epoch)
        if lease.owner is None:
            raise StaleOwnerError(f"the lease of world {folder.name!r}, epoch {epoch}, was given back; acquire it anew")
        _write(folder, epoch, lease.owner, ttl_s)


def release(folder: Path, owner: str, epoch: int) -> bool:
    """Give the lease back; False if it had passed to another already."""
    with locked(folder):
        lease = read_lease(folder)
        if lease is None or lease.epoch != epoch or lease.owner != owner:
            return False
        _write(folder, epoch, None, 0.0)
        return True


def check_epoch(folder: Path, epoch: int) -> Lease:
    """The lease, whose epoch must be `epoch`. Raises: StaleOwnerError."""
    lease = read_lease(folder)
    if lease is None or lease.epoch != epoch:
        now = f"epoch {lease.epoch}, owner {lease.owner!r}" if lease is not None else "no lease"
        raise StaleOwnerError(
            f"this run of world {folder.name!r} has owner epoch {epoch}, but the store has {now}: another run took "
            "the world over; nothing was published, begin the step again from the head"
        )
    return lease


def _write(folder: Path, epoch: int, owner: str | None, ttl_s: float) -> None:
    host, boot, pid, start = _process()
    lease = Lease(
        epoch=epoch, owner=owner, host=host, boot=boot, pid=pid, process_start=start, expires_at=time.time() + ttl_s
    )
    value = lease.model_dump(mode="json")
    write_file(folder / "lease.json", canonical_bytes({**value, "sha256": sha256_json(value)}))


def _process() -> tuple[str, str, int, str]:
    """Host, boot, pid and start of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    pid = os.getpid()
    return socket.gethostname(), boot, pid, process_start(pid) or ""


def process_start(pid: int) -> str | None:
    """When a process of this host started, as text that tells it from a later one with its pid; None if it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _process_start_portable(pid)
    fields = stat.rpartition(")")[2].split()  # after the name: state is the 3rd field of the file, start the 22nd
    return None if fields[0] in "ZX" else fields[19]


def _process_start_portable(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None

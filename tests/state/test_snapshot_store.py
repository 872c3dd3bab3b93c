"""The snapshot store: blobs, manifests, races, kills, corruption, leases, journal, forks."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from publisher import full_state, next_snapshot

from wg_core.errors import ConfigError, CorruptSnapshotError, SnapshotConflictError, StaleOwnerError
from wg_core.state.blobs import BlobStore, FileBlobs, MemoryBlobs
from wg_core.state.canonical import sha256_bytes
from wg_core.state.content import WorldContent
from wg_core.state.state import State
from wg_core.state.store import Snapshot, SnapshotStore, StageRecord

SCRIPT = Path(__file__).with_name("publisher.py")
KEY = "12" * 32


@pytest.fixture
def store(tmp_path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "store")


@pytest.fixture
def spawn(store):
    """Start publisher processes; those still alive at the end are killed."""
    started = []

    def start(*args: str) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), str(store.root), *args]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def publish(store: SnapshotStore, world: str = "w", steps: int = 1) -> Snapshot:
    for _ in range(steps):
        epoch = store.acquire(world, "me")
        last = store.publish(next_snapshot(store, world), epoch=epoch)
        store.release(world, "me", epoch)
    return last


def manifest(store: SnapshotStore, step: int) -> Path:
    return store.root / "w" / "manifests" / f"{step:06d}.json"


# ---- blobs -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50), max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blobs_by_hash(tmp_path, datas):
    """C-5: in memory and in files, bytes come back under their sha256, and twice is once."""
    kinds: list[BlobStore] = [MemoryBlobs(), FileBlobs(tmp_path)]
    for blobs in kinds:
        for data in datas:
            sha = blobs.put(data)
            assert sha == blobs.put(data) == sha256_bytes(data) and blobs.get(sha) == data and blobs.has(sha)
        absent = sha256_bytes(b"absent" * 20)
        assert not blobs.has(absent)
        with pytest.raises(CorruptSnapshotError, match=absent):
            blobs.get(absent)


def test_file_blobs(tmp_path):
    """C-5, C-9: fan-out folders, no rewriting, hashes checked on reading, bad ids refused."""
    blobs = FileBlobs(tmp_path)
    sha = blobs.put(b"hello")
    path = tmp_path / sha[:2] / sha[2:4] / sha
    assert path.read_bytes() == b"hello" and list(path.parent.iterdir()) == [path]
    before = path.stat().st_mtime_ns, path.stat().st_ino
    FileBlobs(tmp_path).put(b"hello")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert FileBlobs(tmp_path) == blobs != FileBlobs(tmp_path / "x")
    path.write_bytes(b"hellO")
    with pytest.raises(CorruptSnapshotError, match="corrupt"):
        blobs.get(sha)
    path.write_bytes(b"hel")  # cut short: writing it again mends it
    FileBlobs(tmp_path).put(b"hello")
    assert blobs.get(sha) == b"hello"
    for bad in ("../../etc/passwd", "", "AB" * 32, sha[:-1]):
        with pytest.raises(ConfigError, match="bad blob id"):
            blobs.get(bad)


# ---- publishing ------------------------------------------------------------------------------------------------------


def test_publish_and_read(store):
    """C-4, C-5, W-12: head, history and content after three steps; a snapshot reads as it was published."""
    assert store.head("w") is None and store.history("w") == [] and store.steps("w") == []
    last = publish(store, steps=3)
    assert store.head("w") == last == store.get("w", 2) and last.id == store.get("w", 2).id
    history = store.history("w")
    assert [s.step for s in history] == [0, 1, 2]
    assert [s.parent for s in history] == [None, history[0].id, history[1].id]
    assert store.content(last).ids("entity") == ["mara", "e0", "e1", "e2"]
    assert State.of(last.carried).filled() == {1, 2, 3} and store.worlds() == ["w"]
    assert store.verify("w") == []
    with pytest.raises(ConfigError, match="no step 7; it has 0 to 2"):
        store.get("w", 7)


def test_id_leaves_out_when_and_where(store):
    """C-4: the id is the hash without run part, timings and usage; the file hash covers all."""
    snapshot = next_snapshot(store, "w")
    fast = StageRecord(role="author", ran=True, seconds=1.0, usage={"m": {"calls": 1}}, wrote=["outcome"])
    slow = fast.model_copy(update={"seconds": 9.0, "usage": {}})
    a = snapshot.model_copy(update={"stages": [fast], "run": {"created_at": 1.0}})
    b = snapshot.model_copy(update={"stages": [slow], "run": {"created_at": 2.0, "host": "h"}})
    assert a.id == b.id and a.to_json()["file_hash"] != b.to_json()["file_hash"]
    others = [{"seed": 99}, {"action": "storm"}, {"config_hash": "x"}, {"models": {"m": None}}, {"carried": {}}]
    others += [{"stages": [fast.model_copy(update={"ran": False})]}, {"world_id": "v"}, {"content": "0" * 64}]
    assert len({a.id, *(a.model_copy(update=u).id for u in others)}) == len(others) + 1
    assert Snapshot.from_json(a.to_json()) == a
    with pytest.raises(ConfigError, match="file hash"):
        Snapshot.from_json({**a.to_json(), "seed": 3})
    assert set(a.diff(a.model_copy(update={"action": "storm"}))) == {"action"}


def test_published_steps_never_change(store):
    """C-5, C-6, K-5: the same id again is a no-op that can be told; another is refused with the hint to fork."""
    publish(store)
    epoch = store.acquire("w", "me")
    again = next_snapshot(store, "w")
    assert store.publish(again, epoch=epoch) is again
    raw = manifest(store, 1).read_bytes()
    rerun = again.model_copy(update={"run": {"created_at": 5}})
    published = store.publish(rerun, epoch=epoch)
    assert published is not rerun and published == again and manifest(store, 1).read_bytes() == raw
    with pytest.raises(SnapshotConflictError, match=r"step 1 .* never changes; .*wg fork w@0"):
        store.publish(again.model_copy(update={"seed": 77}), epoch=epoch)
    assert manifest(store, 1).read_bytes() == raw


def test_publish_needs_the_head_as_parent(store):
    """C-6: no gaps, no second root, no other parent, and the content must be in the store."""
    first = publish(store)
    epoch = store.acquire("w", "me")
    good = next_snapshot(store, "w")
    for wrong in ({"step": 2}, {"parent": None}, {"parent": "0" * 64}):
        with pytest.raises(SnapshotConflictError, match=r"is at step 0 .*wg fork"):
            store.publish(good.model_copy(update=wrong), epoch=epoch)
    with pytest.raises(CorruptSnapshotError, match="save it there first"):
        store.publish(good.model_copy(update={"content": "0" * 64}), epoch=epoch)
    empty = store.acquire("new", "me")
    with pytest.raises(SnapshotConflictError, match="begins with step 0"):
        store.publish(good.model_copy(update={"world_id": "new", "parent": None}), epoch=empty)
    assert store.head("w") == first and store.head("new") is None


def test_ids_are_checked_before_the_disk(store):
    """C-9: an id that is no id never becomes a path."""
    for bad in ("../w", "a/b", "", "a" * 65, "1a", "w\n", "blobs"):
        for call in (store.head, store.history, store.verify, store.lease, lambda w: store.acquire(w, "me")):
            with pytest.raises(ConfigError):
                call(bad)
    assert not store.root.exists()


# ---- leases ----------------------------------------------------------------------------------------------------------


def test_lease(store):
    """C-6: one owner at a time; every new owner has a higher epoch; the lease lives in the store."""
    assert store.lease("w") is None
    one = store.acquire("w", "a")
    assert store.acquire("w", "a") == one  # the same owner of the same process
    with pytest.raises(SnapshotConflictError, match="written by 'a'"):
        SnapshotStore(store.root).acquire("w", "b")
    assert store.release("w", "a", one) and not store.release("w", "a", one)
    two = store.acquire("w", "b", ttl_s=0.05)
    time.sleep(0.06)
    three = store.acquire("w", "c")
    assert one < two < three and store.lease("w").owner == "c"
    with pytest.raises(StaleOwnerError):
        store.renew("w", two)
    assert not store.release("w", "b", two) and store.lease("w").owner == "c"
    store.renew("w", three, ttl_s=1000)
    assert store.lease("w").expires_at > time.time() + 900


def test_stale_epoch_is_refused(store):
    """C-6, K-4: an owner that was overtaken publishes nothing, not even the same snapshot."""
    publish(store)
    old = store.acquire("w", "a", ttl_s=0.01)
    snapshot = next_snapshot(store, "w")
    time.sleep(0.02)
    new = store.acquire("w", "b")
    with pytest.raises(StaleOwnerError, match="took the world over"):
        store.publish(snapshot, epoch=old)
    with pytest.raises(StaleOwnerError):
        store.publish(snapshot, epoch=new + 1)
    assert store.publish(snapshot, epoch=new) is snapshot
    with pytest.raises(StaleOwnerError):
        store.publish(snapshot, epoch=old)
    with pytest.raises(StaleOwnerError, match="no lease"):
        store.publish(snapshot.model_copy(update={"world_id": "never"}), epoch=1)


def test_lease_of_a_killed_process_is_free(store, spawn):
    """C-6, K-13: while its owner lives a lease is held, and the moment it is killed another may take it."""
    holder = spawn("w", "hold", "victim")
    epoch = int(holder.stdout.readline())
    with pytest.raises(SnapshotConflictError, match="victim"):
        store.acquire("w", "heir")
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    assert store.acquire("w", "heir") == epoch + 1


def test_lease_with_the_pid_of_another_process_is_free(store):
    """C-6: a pid that now belongs to a later process does not keep a lease alive."""
    from wg_core.state.canonical import canonical_bytes, sha256_json

    epoch = store.acquire("w", "a")
    value = {**store.lease("w").model_dump(), "process_start": "1"}
    (store.root / "w" / "lease.json").write_bytes(canonical_bytes({**value, "sha256": sha256_json(value)}))
    assert store.acquire("w", "b") == epoch + 1


def test_frozen_owner_that_thaws_is_refused(store, spawn):
    """C-6: a run that was stopped and goes on after another took over is refused loudly."""
    frozen = spawn("w", "stale", "frozen")
    assert frozen.stdout.readline() == "ready\n"
    os.kill(frozen.pid, signal.SIGSTOP)
    time.sleep(0.06)
    epoch = store.acquire("w", "other")
    mine = store.publish(next_snapshot(store, "w", "other"), epoch=epoch)
    os.kill(frozen.pid, signal.SIGCONT)
    assert frozen.communicate("go\n", timeout=20)[0] == "lost StaleOwnerError\n"
    assert store.history("w") == [mine] and store.verify("w") == []


# ---- races and kills -------------------------------------------------------------------------------------------------


def test_racing_publishers_one_wins(store, spawn):
    """C-6: of two processes that publish the same step exactly one wins; the loser leaves only blobs."""
    publish(store)
    for _ in range(3):
        epoch = store.acquire("w", "both")
        step = store.head("w").step + 1
        racers = [spawn("w", "race", f"{name}:{epoch}") for name in ("a", "b")]
        assert [r.stdout.readline() for r in racers] == ["ready\n"] * 2
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = sorted(r.stdout.readline().split() for r in racers)
        assert said[0] == ["lost", "SnapshotConflictError"] and said[1] == ["won", store.head("w").id]
        assert store.head("w").step == step
    assert store.verify("w") == []
    assert sorted(p.name for p in (store.root / "w").rglob("*") if p.is_file()) == sorted(
        [*(f"{s:06d}.json" for s in range(4)), "lease.json", "lock"]
    )


def test_racing_threads_one_wins(store):
    """C-6: threads with a lock each and the same epoch are kept apart as processes are."""
    epoch = store.acquire("w", "me")
    snapshots = [next_snapshot(SnapshotStore(store.root), "w", f"t{i}") for i in range(8)]
    results: list[str] = []

    def race(snapshot: Snapshot) -> None:
        try:
            SnapshotStore(store.root).publish(snapshot, epoch=epoch)
            results.append("won")
        except SnapshotConflictError:
            results.append("lost")

    threads = [threading.Thread(target=race, args=(s,)) for s in snapshots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["lost"] * 7 + ["won"]


def test_killed_at_any_moment_the_store_is_whole(store, spawn):
    """C-5, C-6, K-13: a writer killed at random instants leaves complete steps, and the next goes on."""
    rng = random.Random(5)
    reached = 0
    for round in range(5):
        writer = spawn("w", "loop", f"writer{round}")
        told = int(writer.stdout.readline())
        time.sleep(rng.uniform(0, 0.06))
        writer.kill()
        rest = writer.communicate()[0].split()
        told = int(rest[-1]) if rest else told
        assert store.verify("w") == []
        steps = store.steps("w")
        assert steps == list(range(len(steps))) and steps[-1] >= told >= reached  # what was told is published
        assert [s.step for s in store.history("w")] == steps
        reached = steps[-1]
    assert publish(store).step == reached + 1
    content = store.content(store.head("w"))
    assert [e["step"] for e in content.chronicle()] == list(range(reached + 2))
    assert list((store.root / "w" / "manifests").glob(".tmp-*")) == []


def test_killed_at_each_line_the_store_is_whole(store, spawn):
    """C-5, K-13: SIGKILL at any line of writing leaves whole steps, and the next writer takes over at once."""
    out = spawn("-", "die", "7").communicate(timeout=60)[0].split()
    assert out[0] == "whole" and int(out[1]) > 30 and out[2] == "0", out


def test_half_written_files_are_ignored(store):
    """C-5: stray temporary files of a killed run are neither read nor in the way."""
    publish(store)
    folder = manifest(store, 0).parent
    (folder / ".tmp-1-abc").write_bytes(b'{"half')
    (folder / "notes.txt").write_text("x")
    assert store.steps("w") == [0] and store.verify("w") == []
    publish(store)
    assert store.steps("w") == [0, 1] and not (folder / ".tmp-1-abc").exists()


# ---- corruption ------------------------------------------------------------------------------------------------------


def test_any_flipped_byte_of_a_manifest_is_noticed(store):
    """C-5: other bytes are CorruptSnapshotError, never wrong data."""
    publish(store, steps=2)
    path = manifest(store, 1)
    raw = path.read_bytes()
    rng = random.Random(1)
    for place in [0, len(raw) - 1, *rng.sample(range(len(raw)), 120)]:
        broken = bytearray(raw)
        broken[place] ^= rng.choice([1, 2, 0x20, 0x80])
        path.write_bytes(bytes(broken))
        for read in (lambda: store.get("w", 1), lambda: store.head("w"), lambda: store.history("w")):
            with pytest.raises(CorruptSnapshotError, match=r"000001\.json is corrupt"):
                read()
    for broken in (b"", raw[:-1], raw + b" ", b"[]", raw.replace(b'"step":1', b'"step":1 ')):
        path.write_bytes(broken)
        with pytest.raises(CorruptSnapshotError):
            store.get("w", 1)
    assert any("000001.json is corrupt" in p for p in store.verify("w"))
    path.write_bytes(raw)
    assert store.verify("w") == []


def test_every_broken_blob_is_found(store):
    """C-5, C-7: verify names each blob, content part or artifact, that is missing or altered."""
    publish(store, steps=2)
    head = store.head("w")
    parts = [part.save(store.blobs) for _, part in store.content(head).parts()]
    for sha in {*parts, *head.artifacts(), head.content}:
        path = store.blobs.path(sha)
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        assert [p for p in store.verify("w") if sha in p and "corrupt" in p], sha
        path.unlink()
        assert [p for p in store.verify("w") if sha in p and "missing" in p], sha
        path.write_bytes(raw)
    assert store.verify("w") == []


def test_broken_chain_is_found(store):
    """C-7: a manifest that is missing or from another history breaks the chain."""
    publish(store, steps=3)
    raw = manifest(store, 1).read_bytes()
    manifest(store, 1).unlink()
    with pytest.raises(CorruptSnapshotError, match="the step after 0 is 1, not 2"):
        store.history("w")
    assert any("the step after 0 is 1" in p for p in store.verify("w"))
    manifest(store, 1).write_bytes(raw)
    foreign = SnapshotStore(store.root.parent / "foreign")
    epoch = foreign.acquire("w", "me")
    foreign.publish(next_snapshot(foreign, "w").model_copy(update={"seed": 42}), epoch=epoch)
    manifest(store, 0).write_bytes(manifest(foreign, 0).read_bytes())
    assert any("its parent is" in p for p in store.verify("w"))
    with pytest.raises(CorruptSnapshotError, match="is broken"):
        store.history("w")
    manifest(store, 0).write_bytes(raw)  # whole, but of step 1
    with pytest.raises(CorruptSnapshotError, match="holds step 1"):
        store.get("w", 0)


def test_artifacts_elsewhere_are_not_looked_for(store):
    """W-3: an artifact with a foreign uri is a reference; one without must be in the store."""
    picture = {"id": "0" * 64, "media_type": "image/png", "uri": "https://example.org/a.png"}
    for uri, faults in (("https://example.org/a.png", 0), ("blob:" + "0" * 64, 1), ("", 1)):
        world = f"w{len(uri)}"
        snapshot = Snapshot(
            world_id=world,
            step=0,
            given=State.of({3: {"images": [{**picture, "uri": uri}]}}),
            content=WorldContent().save(store.blobs),
        )
        store.publish(snapshot, epoch=store.acquire(world, "me"))
        assert len(store.verify(world)) == faults


def test_corrupt_lease_is_loud(store):
    """C-6: an altered lease never lets a second writer in."""
    store.acquire("w", "a")
    path = store.root / "w" / "lease.json"
    path.write_bytes(path.read_bytes().replace(b'"epoch":1', b'"epoch":2'))
    with pytest.raises(CorruptSnapshotError, match=r"lease.json is corrupt"):
        store.acquire("w", "b")
    assert any("lease.json" in p for p in store.verify("w"))


# ---- journal, forks --------------------------------------------------------------------------------------------------


def test_journal(store):
    """C-10: a stage's result is kept under its key until its step is cleared, and checked when it is read."""
    assert store.journal_get("w", KEY) is None
    store.journal_put("w", KEY, {"state": {"intent": {"text": "x"}}})
    store.journal_put("w", "34" * 32, {"n": 1}, step=4)
    assert SnapshotStore(store.root).journal_get("w", KEY) == {"state": {"intent": {"text": "x"}}}
    store.journal_clear("w", 0)
    assert store.journal_get("w", KEY) is None and store.journal_get("w", "34" * 32) == {"n": 1}
    path = next((store.root / "w" / "journal").glob("000004-*.json"))
    path.write_bytes(path.read_bytes().replace(b'"n":1', b'"n":2'))
    with pytest.raises(CorruptSnapshotError, match="the stage will run again"):
        store.journal_get("w", "34" * 32)
    for bad in ("x", "../../x", "*"):
        with pytest.raises(ConfigError, match="bad journal key"):
            store.journal_get("w", bad)
    with pytest.raises(ConfigError):
        store.journal_put("w", KEY, {"x": float("nan")})


def test_fork_copies_no_blobs(store):
    """C-7: a fork begins with a step of its origin and goes its own way."""
    publish(store, steps=3)
    blobs = sorted(p for p in store.blobs.root.rglob("*") if p.is_file())
    forked = store.fork("w", 1, "other")
    assert sorted(p for p in store.blobs.root.rglob("*") if p.is_file()) == blobs
    assert forked.origin.id == store.get("w", 1).id and store.head("other") == forked and forked.parent is None
    assert publish(store, "other").step == 2 and store.head("w").step == 2
    assert store.verify("other") == store.verify("w") == []
    assert store.content(store.head("other")).chronicle_length == 3
    with pytest.raises(SnapshotConflictError, match="has a history already"):
        store.fork("w", 0, "other")
    with pytest.raises(ConfigError, match="no step 9"):
        store.fork("w", 9, "third")


def test_a_large_blob_is_written_once_and_whole(store):
    """C-5: what is large is hashed while it is written; stored bytes are not written again, and nothing is left over."""
    data = bytes(range(256)) * 8192
    sha = store.blobs.put(data)
    before = store.blobs.path(sha).stat()
    assert store.blobs.put(data) == sha and store.blobs.get(sha) == data
    after = store.blobs.path(sha).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [p.name for p in store.blobs.root.rglob("*") if p.is_file()] == [sha]
    with pytest.raises(TypeError):
        store.blobs.put([0] * (1 << 20))
    assert [p.name for p in store.blobs.root.rglob("*") if p.is_file()] == [sha]


def test_unreferenced_blobs_harm_nobody(store):
    """C-6: what a loser stored is unreferenced and does not show in the history."""
    publish(store)
    full_state(store.blobs, 99, "loser")
    assert store.verify("w") == [] and store.steps("w") == [0]

"""Forks, differences, thinning, removing and moving of histories."""

from __future__ import annotations

import json
import os
import time
import zipfile
from pathlib import Path

import jsonpatch
import pytest
from publisher import full_state

from wg_core import World
from wg_core.errors import CheckpointError, ConfigError, CorruptSnapshotError, SnapshotConflictError
from wg_core.levels.transfer import export_world, import_world
from wg_core.state.content import WorldContent, apply
from wg_core.state.store import Snapshot, SnapshotStore
from wg_core.state.upkeep import read_pruned


def stub(root: Path, world_id: str = "trial") -> World:
    world = World.from_template("stub", world_id=world_id, seed=5)
    world.set_storage(root)
    return world


def blobs_of(store: SnapshotStore) -> set[str]:
    return {p.name for p in store.blobs.root.rglob("*") if p.is_file()}


def test_a_fork_goes_its_own_way(tmp_path: Path) -> None:
    """03 C-7: no blob is copied, the origin stays as it is, both go on."""
    world = stub(tmp_path)
    list(world.evolve(3))
    ids, blobs = [s.id for s in world.history()], blobs_of(world.store)
    other = world.fork("other", 1)
    assert blobs_of(world.store) == blobs
    assert [s.step for s in other.history()] == [1] and other.history()[0].origin.id == ids[1]  # type: ignore[union-attr]
    assert other.step(action="a whale comes in").step == 2
    assert other.config_hash == world.config_hash
    assert [s.id for s in world.history()] == ids
    assert world.verify() == other.verify() == []
    with pytest.raises(SnapshotConflictError, match="history already"):
        world.fork("other", 0)
    with pytest.raises(ConfigError, match="no step 9"):
        world.fork("third", 9)
    assert world.world_id == "trial" and world.step().step == 3


def test_diff_is_a_patch_that_another_library_applies(tmp_path: Path) -> None:
    """03 C-7, RFC 6902: the patch from A to B, applied to A's document, gives B's; also between worlds."""
    world = stub(tmp_path)
    a, _, b = world.evolve(3)
    other = world.fork("other", 1)
    c = other.step(action="a whale comes in")
    store = world.store
    for first, second in ((a, b), (b, a), (b, c), (a, a)):
        patch = store.diff(first, second)
        json.dumps(patch)
        assert jsonpatch.apply_patch(store.document(first), patch) == store.document(second)
        assert all(set(op) <= {"op", "path", "value", "from"} for op in patch)
    assert world.diff(0, 0) == [] and world.diff(0, 2) == store.diff(a, b)
    assert any(op["path"] == "/content/chronicle/1" for op in world.diff(1, 2))


def test_gc_removes_what_nothing_names_and_nothing_else(tmp_path: Path) -> None:
    """03 C-7: unreferenced blobs go, young ones stay; every world of the store still verifies and replays."""
    world = stub(tmp_path)
    list(world.evolve(3))
    other = world.fork("other", 1)
    other.step()
    used = blobs_of(world.store)
    stray = world.store.blobs.put(b"nobody names me")
    assert world.gc().blobs == 0  # it is young
    assert world.gc(grace_s=0, dry_run=True).blobs == 1 and world.store.blobs.has(stray)
    removed = world.gc(grace_s=0)
    assert (removed.blobs, removed.bytes, removed.steps) == (1, 15, [])
    assert blobs_of(world.store) == used and removed.kept_blobs == len(used)
    assert world.verify() == other.verify() == []
    assert world.replay(2).same
    old = time.time() - 7200
    sha = world.store.blobs.put(b"old but wanted again")
    os.utime(world.store.blobs.path(sha), (old, old))
    world.store.blobs.put(b"old but wanted again")
    assert world.gc().blobs == 0 and world.store.blobs.has(sha)


def test_gc_keeps_what_a_broken_off_step_has_done(tmp_path: Path) -> None:
    """03 C-10: the journal of a failed step keeps its blobs, and nobody may write while blobs are removed."""
    world, undisturbed = stub(tmp_path / "a"), stub(tmp_path / "b")
    world.step()
    flow = world.begin()
    for role in world.cycle[:5]:
        flow = world.run_stage(role, flow)
    with pytest.raises(SnapshotConflictError, match="being written"):
        world.gc(grace_s=0)
    world.abandon(flow)
    world.gc(grace_s=0)
    resumed = world.step()
    assert resumed.id == list(undisturbed.evolve(2))[1].id
    assert world.verify() == [] and world.replay().same


def test_max_snapshots_keeps_the_last_and_parents_of_forks(tmp_path: Path) -> None:
    """03 C-7: a thinned history still verifies as a chain, steps on, and its forks live."""
    world = stub(tmp_path)
    list(world.evolve(6))
    ids = {s.step: s.id for s in world.history()}
    other = world.fork("other", 2)
    size = len(blobs_of(world.store))
    removed = world.gc(max_snapshots=2, grace_s=0)
    assert removed.steps == [0, 1, 3] and removed.blobs > 0 and len(blobs_of(world.store)) == size - removed.blobs
    assert world.store.steps("trial") == [2, 4, 5]
    assert read_pruned(tmp_path / "trial") == {step: ids[step] for step in (0, 1, 3)}
    assert [s.id for s in world.history()] == [ids[2], ids[4], ids[5]]
    assert world.verify() == other.verify() == []
    assert world.step().step == 6 and other.step().step == 3
    with pytest.raises(ConfigError, match="step 1 of world 'trial' was removed"):
        world.store.get("trial", 1)
    path = tmp_path / "trial" / "pruned.json"
    path.write_text(path.read_text().replace(ids[3], "0" * 64))
    assert any("pruned.json" in problem for problem in world.verify())
    with pytest.raises(ConfigError, match="at least 1"):
        world.gc(max_snapshots=0)


def test_a_thinned_history_keeps_no_record_as_it_was_before(tmp_path: Path) -> None:
    """03 C-1, C-7: the chain of a content names old forms of its records; only the steps that are kept hold them."""
    store = SnapshotStore(tmp_path)
    content, parent, forms = WorldContent.from_seed({"characters": ["mara", "ben"]}), None, []
    epoch = store.acquire("w", "test")
    for step in range(6):
        change = {"op": "update", "kind": "entity", "id": "mara", "fields": {"n": step}}
        state = full_state(store.blobs, step).put("outcome", {"narrative": f"event {step}", "changes": [change]})
        content = apply(content, state, step=step, made_by="test")
        root = content.save(store.blobs)
        snapshot = Snapshot(world_id="w", step=step, parent=parent, content=root)
        parent = store.publish(snapshot, epoch=epoch).id
        forms.append(dict(WorldContent.load(store.blobs, root).parts())["entity:mara"].hash())
    store.release("w", "test", epoch)
    assert len(set(forms)) == 6 and store.gc(grace_s=0).blobs == 1  # the seed's Mara
    store.gc("w", max_snapshots=2, grace_s=0)
    assert [store.blobs.has(sha) for sha in forms] == [False] * 4 + [True] * 2
    assert store.verify("w") == []
    assert [store.content(s).get("entity", "mara")["fields"]["n"] for s in store.history("w")] == [4, 5]  # type: ignore[index]
    assert [e["narrative"] for e in store.content(store.history("w")[0]).chronicle()] == [f"event {n}" for n in range(5)]
    store.blobs.forget(forms[4])
    assert len(problems := store.verify("w")) == 1 and "step 4: content: entity:mara" in problems[0]


def test_a_swapped_step_after_a_removed_one_is_found(tmp_path: Path) -> None:
    """The ids of removed steps keep the chain: another history's step does not fit in."""
    world, foreign = stub(tmp_path / "a"), stub(tmp_path / "b")
    list(world.evolve(4))
    foreign.step(seed=99)
    list(foreign.evolve(3))
    world.gc(max_snapshots=1, grace_s=0)
    target = world.store.manifest_path("trial", 3)
    target.write_bytes(foreign.store.manifest_path("trial", 3).read_bytes())
    assert any("removed step" in problem for problem in world.verify())


def test_export_and_import(tmp_path: Path) -> None:
    """03 C-7: one archive holds the world's file, history and blobs; elsewhere it verifies, replays and steps on."""
    world = stub(tmp_path / "a")
    list(world.evolve(3))
    stub(tmp_path / "a", "bystander").step(action="a whale comes in")
    archive = export_world(world, tmp_path / "trial.zip")
    store = SnapshotStore(tmp_path / "b")
    world_id, file = import_world(archive, store, tmp_path / "worlds")
    assert (world_id, file) == ("trial", tmp_path / "worlds" / "trial.yaml")
    assert store.worlds() == ["trial"] and blobs_of(store) < blobs_of(world.store)
    again = World.from_yaml(file)
    again.set_storage(store)
    assert [s.id for s in again.history()] == [s.id for s in world.history()]
    assert again.verify() == [] and again.replay(2).same
    assert again.step().id == world.step().id
    assert not [p for root in ("a", "b") for p in (tmp_path / root).iterdir() if p.name.startswith(".tmp-")]
    with pytest.raises(ConfigError, match="exists"):
        export_world(world, archive)
    with pytest.raises(ConfigError, match="exists"):
        import_world(archive, SnapshotStore(tmp_path / "c"), tmp_path / "worlds")
    with pytest.raises(SnapshotConflictError, match="history of world 'trial' already"):
        import_world(archive, store, tmp_path / "elsewhere")


def test_a_thinned_world_can_be_moved(tmp_path: Path) -> None:
    world = stub(tmp_path / "a")
    list(world.evolve(4))
    world.gc(max_snapshots=2, grace_s=0)
    store = SnapshotStore(tmp_path / "b")
    import_world(export_world(world, tmp_path / "trial.zip"), store, tmp_path / "worlds")
    assert store.verify("trial") == [] and store.steps("trial") == [2, 3]


def hostile(archive: Path, target: Path, change: str) -> Path:
    """The archive with one thing wrong."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for info in source.infolist():
            data = source.read(info)
            if change == "altered blob" and "/blobs/" in info.filename and len(data) > 1000:
                data = data[:-1] + b"?"
            if change == "missing blob" and "/blobs/" in info.filename and data.startswith(b"\x89PNG"):
                continue
            if change == "altered step" and info.filename.endswith("000001.json"):
                data = data.replace(b'"seed":5', b'"seed":6')
            if change == "another world's file" and info.filename == "world.yaml":
                data = data.replace(b"world_id: trial", b"world_id: tribal")
            made.writestr(info.filename, data)
        if change == "leaves the folder":
            made.writestr("../up.txt", b"x")
        if change == "absolute":
            made.writestr("/etc/up.txt", b"x")
        if change == "stranger":
            made.writestr("store/trial/evil.sh", b"x")
        if change == "bomb":
            made.writestr("store/blobs/00/00/" + "0" * 64, b"\0" * (200 * 1024 * 1024))
        if change == "link":
            info = zipfile.ZipInfo("store/link")
            info.external_attr = 0o120777 << 16
            made.writestr(info, "/etc/passwd")
    return target


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("leaves the folder", CheckpointError),
        ("absolute", CheckpointError),
        ("link", CheckpointError),
        ("bomb", CheckpointError),
        ("stranger", ConfigError),
        ("altered blob", CorruptSnapshotError),
        ("missing blob", CorruptSnapshotError),
        ("altered step", CorruptSnapshotError),
        ("another world's file", ConfigError),
    ],
)
def test_a_bad_archive_leaves_nothing_behind(tmp_path: Path, change: str, error: type[Exception]) -> None:
    """03 C-7, C-5: path traversal, bombs, links, altered bytes: refused before anything is taken in."""
    world = stub(tmp_path / "a")
    list(world.evolve(2))
    archive = hostile(export_world(world, tmp_path / "good.zip"), tmp_path / "bad.zip", change)
    store = SnapshotStore(tmp_path / "b")
    with pytest.raises(error):
        import_world(archive, store, tmp_path / "worlds")
    assert list((tmp_path / "b").iterdir()) == [] and not (tmp_path / "worlds").exists()
    assert not (tmp_path / "up.txt").exists()


def test_a_broken_file_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK no")
    with pytest.raises(CheckpointError, match="no readable archive"):
        import_world(tmp_path / "x.zip", SnapshotStore(tmp_path / "b"), tmp_path)
    with pytest.raises(FileNotFoundError):
        import_world(tmp_path / "none.zip", SnapshotStore(tmp_path / "b"), tmp_path)
    with pytest.raises(ConfigError, match="no snapshot yet"):
        export_world(stub(tmp_path / "c"), tmp_path / "y.zip")

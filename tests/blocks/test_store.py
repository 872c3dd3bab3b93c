"""The model store, with real wheels built here and fetched by the real pip from a local folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from wg_blocks.store import ModelStore, Ref, progress_bar
from wg_blocks.store.fetch import Archive
from wg_blocks.store.store import RECORD, catalogue
from wg_core.errors import ConfigError, CorruptSnapshotError, MissingModelError

WEIGHT = bytes(range(256)) * 4000
SHA = hashlib.sha256(WEIGHT).hexdigest()
REF = f"pypi:tiny-model==1.0/tiny_model/weights/tiny.bin#sha256={SHA}"


def build_wheel(folder: Path, weight: bytes = WEIGHT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('the package was imported')")
        wheel.writestr("tiny_model/weights/tiny.bin", weight)
        wheel.writestr("tiny_model/../../LICENSE.evil", "not outside")
        wheel.writestr(f"{info}/licenses/LICENSE", "Permission is granted")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nowhere-at-all\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models folder after one pull, to be copied."""
    root = tmp_path_factory.mktemp("pulled")
    build_wheel(root / "index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(root / "index"))
        ModelStore(root / "home" / "models").pull(REF)
    return root / "home" / "models"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    """A store whose pip sees nothing but one wheel in a local folder."""
    build_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("WG_MODEL_ROOTS", raising=False)
    return ModelStore(tmp_path / "home" / "models")


def had(store: ModelStore, pulled: Path) -> Path:
    """The model's file in `store`, as a pull had left it there."""
    shutil.copytree(pulled, store.root)
    return store.path(REF)


def test_pull_takes_one_file_and_its_licence_and_nothing_else(store: ModelStore, tmp_path: Path) -> None:
    # proves 03 O-3
    phases: list[tuple[str, int, int | None]] = []
    path = store.pull(REF, lambda *step: phases.append(step))
    assert path.read_bytes() == WEIGHT
    assert sorted(p.name for p in path.parent.rglob("*") if p.is_file()) == [
        RECORD,
        "LICENSE",
        "LICENSE.evil",
        "tiny.bin",
    ]
    assert {phase for phase, _, _ in phases} >= {"download", "unpack", "check"}
    assert store.info(REF)["sha256"] == SHA
    assert [p.name for p in (store.root / ".work").iterdir()] == [f"{Ref.parse(REF).folder}.lock"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "index"]


def test_a_second_pull_works_offline_and_changes_nothing(
    store: ModelStore, pulled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = had(store, pulled)
    before = path.stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert store.pull(REF) == path == store.path(REF)
    assert path.stat().st_mtime_ns == before
    assert any(row["installed"] and row["bytes"] >= len(WEIGHT) for row in store.list())


def test_wrong_bytes_are_refused_and_leave_nothing(store: ModelStore) -> None:
    wrong = REF.replace(SHA, "0" * 64)
    with pytest.raises(CorruptSnapshotError, match=f"{SHA}.*pins 0000"):
        store.pull(wrong)
    assert [p.name for p in store.root.iterdir()] == [".work"]
    with pytest.raises(MissingModelError):
        store.path(wrong)


def test_what_cannot_be_fetched_says_what_the_tool_said(store: ModelStore) -> None:
    with pytest.raises(MissingModelError, match=r"could not download no-such-model==9.*No matching distribution"):
        store.pull(f"pypi:no-such-model==9/x.bin#sha256={SHA}")


def test_verify_finds_changed_and_lost_files_and_pull_mends_the_loss(store: ModelStore, pulled: Path) -> None:
    path = had(store, pulled)
    assert store.verify() == [] == store.verify(REF)
    path.write_bytes(b"\1" + WEIGHT[1:])
    assert len(store.verify(REF)) == 1 and "sha256 differs" in store.verify()[0]
    path.write_bytes(WEIGHT[:1000])
    assert store.verify(REF) == store.verify() and "1000 bytes instead of" in store.verify()[0]
    path.unlink()
    assert store.verify(REF) == store.verify() and store.verify()[0].endswith("missing")
    with pytest.raises(MissingModelError, match="wg models pull"):
        store.path(REF)
    assert store.pull(REF).read_bytes() == WEIGHT
    assert store.verify() == []


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"files": {}}', '{"files": {"tiny.bin": 1}}', '{"files": []}'])
def test_a_damaged_record_is_told_of_and_mended_by_a_pull(record: str, store: ModelStore, pulled: Path) -> None:
    """03 O-3: no verb of the store trips over it, and `verify` does not say that all is well."""
    path = had(store, pulled)
    (path.parent / RECORD).write_text(record)
    assert store.verify() == store.verify(REF) == [f"{path.parent.name}: its record {RECORD} is damaged; pull it again"]
    assert not any(row["installed"] for row in store.list())
    assert store.pull(REF) == path and store.verify() == []


def test_leftovers_of_a_killed_pull_are_cleared(store: ModelStore) -> None:
    folder = Ref.parse(REF).folder
    left = store.root / ".work" / f"{folder}.tmp-dead"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    (store.root / folder).mkdir()
    (store.root / folder / "tiny.bin").write_bytes(b"half")
    assert store.pull(REF).read_bytes() == WEIGHT
    assert not left.exists()


def test_two_processes_fetch_once(store: ModelStore) -> None:
    code = (
        "import sys; from wg_blocks.store import ModelStore; seen = set();"
        "print(ModelStore(sys.argv[1]).pull(sys.argv[2], lambda phase, *_: seen.add(phase)), 'download' in seen)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(store.root), REF]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [run.communicate(timeout=60)[0].strip() for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert sorted(line.rsplit(" ", 1)[1] for line in lines) == ["False", "False", "True"]
    assert store.verify() == []


@pytest.mark.parametrize(
    ("ref", "named"),
    [
        ("nonsense", "unknown model"),
        ("../escape", "unknown model"),
        ("ftp:x", "unknown model ref"),
        ("pypi:tiny-model/tiny.bin", "the form is pypi:"),
        ("pypi:--index-url==1/x", "the form is pypi:"),
        (f"pypi:tiny-model==1.0/../x#sha256={SHA}", "the form is pypi:"),
        ("pypi:tiny-model==1.0/x#sha256=12", "64 hex"),
        ("pypi:tiny-model==1.0/x#md5=12", "64 hex"),
        ("pypi:tiny-model==1.0/x.bin", "not pinned"),
        ("npm:@a/b@1.0/x", "not pinned"),
        ("hf:only-a-name", "the form is hf:"),
        ("hf:a/../b", "the form is hf:"),
    ],
)
def test_bad_refs_are_refused(store: ModelStore, ref: str, named: str) -> None:
    for call in (store.path, store.pull):
        with pytest.raises(ConfigError, match=named):
            call(ref)
    assert not store.root.exists()


def test_refs_of_all_schemes_are_read() -> None:
    npm = Ref.parse(f"npm:@up/slim@1.0.0/package/m.bin#sha256={SHA}")
    assert (npm.package, npm.version, npm.member) == ("@up/slim", "1.0.0", "package/m.bin")
    hub = Ref.parse("hf:owner/name@v1")
    assert (hub.scheme, hub.package, hub.version) == ("hf", "owner/name", "v1")
    assert Ref.parse("hf:owner/name").folder != hub.folder
    assert Ref.parse(REF).folder.startswith("pypi-tiny-model-1.0-")


def test_file_refs_stay_inside_their_roots(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = store.root / "mine" / "w.onnx", tmp_path / "elsewhere" / "w.onnx"
    for path in (inside, outside):
        path.parent.mkdir(parents=True)
        path.write_bytes(WEIGHT)
    (store.root / "link").symlink_to(outside.parent)
    assert store.path("file:mine/w.onnx") == inside
    assert store.path(f"file:{inside}") == inside
    for bad in ("file:../../elsewhere/w.onnx", f"file:{outside}", "file:link/w.onnx", "file:/etc/passwd"):
        with pytest.raises(MissingModelError, match="WG_MODEL_ROOTS"):
            store.path(bad)
    monkeypatch.setenv("WG_MODEL_ROOTS", str(outside.parent))
    assert store.pull(f"file:{outside}#sha256={SHA}") == outside
    with pytest.raises(CorruptSnapshotError):
        store.pull(f"file:{outside}#sha256={'0' * 64}")
    assert store.info(f"file:{outside}")["sha256"] == SHA


def test_weights_in_several_files_are_hashed_together(store: ModelStore) -> None:
    """01 F-36: a pin and what adapters were learned on hold for all shards, not for the first alone."""
    folder = store.root / "mine"
    folder.mkdir(parents=True)
    (folder / "model-1.safetensors").write_bytes(WEIGHT)
    assert store.info("file:mine")["sha256"] == SHA
    (folder / "model-2.safetensors").write_bytes(WEIGHT[:9])
    pinned = f"file:mine#sha256={store.info('file:mine')['sha256']}"
    assert store.pull(pinned) == folder
    (folder / "model-2.safetensors").write_bytes(WEIGHT[1:10])
    assert "sha256 differs" in store.verify(pinned)[0]
    with pytest.raises(CorruptSnapshotError, match="sha256 differs"):
        store.pull(pinned)


def test_missing_catalogue_models_name_the_command(store: ModelStore) -> None:
    for name in catalogue():
        with pytest.raises(MissingModelError, match=f"wg models pull {name}"):
            store.path(name)
    rows = {row["name"]: row for row in store.list()}
    assert not any(row["installed"] for row in rows.values())
    assert [n for n, row in rows.items() if row["default"]] == ["smollm2-135m-instruct", "terrain-consistency", "minilm-l6-v2"]


def test_catalogue_entries_are_whole() -> None:
    prefixes = {
        "smollm2-135m-instruct": "b179c9523d0e6a0f",
        "smollm2-135m-instruct-gguf": "b179c9523d0e6a0f",
        "terrain-consistency": "95be54b4a39d5832",
        "minilm-l6-v2": "53aa51172d142c89",
        "esrgan-slim-x4": "82637daaf3ba024d",
    }
    assert set(catalogue()) == set(prefixes)
    for name, entry in catalogue().items():
        assert entry["sha256"].startswith(prefixes[name]) and len(entry["sha256"]) == 64
        assert entry["licence"] in ("Apache-2.0", "MIT") and entry["download_bytes"] > 0
        Ref.parse(entry["ref"])


def test_wg_home_is_the_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WG_HOME", str(tmp_path))
    assert ModelStore().root == tmp_path / "models"
    monkeypatch.delenv("WG_HOME")
    assert ModelStore().root == Path(".wg/models")


def test_archives_give_members_by_name_only(tmp_path: Path) -> None:
    path = tmp_path / "p.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("package/m/a.bin", "package/n/a.bin", "../up.bin"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, BytesIO(b"abc"))
        link = tarfile.TarInfo("package/link.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with Archive(path) as archive:
        assert archive.find("m/a.bin") == "package/m/a.bin"
        for bad in ("a.bin", "link.bin", "zzz"):
            with pytest.raises(MissingModelError):
                archive.find(bad)
        archive.take("../up.bin", tmp_path / "out" / "x", None)
        with pytest.raises(CorruptSnapshotError, match="larger than 2 bytes"):
            archive.take("package/m/a.bin", tmp_path / "out" / "y", None, limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "p.tgz"]


def test_the_progress_bar_takes_every_phase(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        store.pull(REF, show)
    shown = capsys.readouterr()
    assert shown.out == "" and "unpack" in shown.err


@pytest.mark.slow
def test_the_shipped_models_are_fetched_converted_and_whole(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    model, terrain, *_ = store.pull_default()
    assert not [p for p in store.root.rglob("*") if p.is_dir() and p.name != ".work" and not any(p.iterdir())]
    assert terrain.name.endswith(".onnx") and (terrain.parent / "licences" / "LICENSE").is_file()
    assert {"config.json", "model.safetensors", "tokenizer.json", "licences"} <= {p.name for p in model.iterdir()}
    config = json.loads((model / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    assert store.info("smollm2-135m-instruct")["conversion"]["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert store.verify() == []

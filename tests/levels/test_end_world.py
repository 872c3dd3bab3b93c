"""End Worlds: frozen, linked, quoted, never changed."""

from __future__ import annotations

import inspect
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from wg_core import EndWorld, World
from wg_core.errors import ConfigError, CorruptSnapshotError, EndWorldError
from wg_core.state.content import WorldContent

LINK = {"target_kind": "end_world", "target_id": "book"}


def stub(root: Path, world_id: str = "trial", **content: Any) -> World:
    config = World.from_template("stub", world_id=world_id, seed=5).to_config()
    config["content"] = {**config["content"], **content}
    world = World.from_config(config)
    world.set_storage(root)
    return world


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder in which `book` was frozen from a lived world."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WG_WORLDS", raising=False)
    lived = stub(tmp_path / "lived", "lived", story="Once a heron carried the moon over the salt marsh.")
    list(lived.evolve(3))
    lived.freeze("book", title="The Book")
    return tmp_path


def test_a_frozen_world_holds_all_of_its_content(project: Path) -> None:
    """04 X-49, 03 W-17: content with provenance, chronicle and artifacts; no execution; every hash holds."""
    lived = stub(project / "lived", "lived", story="Once a heron carried the moon over the salt marsh.")
    book = EndWorld.load(project / "worlds" / "book")
    assert (book.world_id, book.title) == ("book", "The Book")
    assert book.content.to_json() == lived.content().to_json()
    assert book.content.chronicle_length == 2 and book.content.why("entity", "ada") == {
        "step": 0,
        "made_by": "world file",
    }
    assert book.verify() == []
    assert "execution" not in (project / "worlds" / "book" / "end_world.yaml").read_text()
    png = [
        f
        for f in fingerprint(project / "worlds" / "book")
        if (project / "worlds" / "book" / f).read_bytes()[:4] == b"\x89PNG"
    ]
    assert len(png) == len(book.content.artifact_ids) == 2
    early = lived.freeze("early", step=1)
    assert early.content.chronicle_length == 1
    with pytest.raises(ConfigError, match="never changes"):
        lived.freeze("book")
    with pytest.raises(ConfigError, match="bad end world id"):
        lived.freeze("../up")


def test_linked_worlds_quote_it_and_its_bytes_stay_equal(project: Path) -> None:
    """04 X-49: a passage of the linked End World is in the Author's prompt; after steps of two worlds no byte changed."""
    before = fingerprint(project / "worlds" / "book")
    for name in ("one", "two"):
        world = stub(project / name, name, links=[LINK])
        snapshots = list(world.evolve(3))
        asked = world.calls(snapshots[1])["author"][0]
        passage = "book: Once a heron carried the moon over the salt marsh."
        assert passage in [item["text"] for item in asked["request"]["context"]]
        assert any(f"- {passage}" in m["content"] for m in asked["messages"])
        assert {"text": passage, "source": "book/story"} in asked["request"]["context"]
        assert world.content().links == [LINK]
        assert world.replay(1).same and world.verify() == []
    assert fingerprint(project / "worlds" / "book") == before and len(before) > 5
    plain = stub(project / "plain", "plain")
    asked = plain.calls(list(plain.evolve(2))[1])["author"][0]
    assert not any("heron" in item["text"] for item in asked["request"]["context"])


def test_the_nearest_passage_is_quoted_under_a_tight_limit(project: Path) -> None:
    """03 C-3: of a linked world one passage, the nearest to the query, comes before the last events."""
    book = EndWorld.load(project / "worlds" / "book")
    mine = WorldContent.from_seed({"style": "Plain.", "story": "Here nothing happened.", "characters": ["Mara"]})
    view = mine.view(linked={"book": book.content})
    assert [i["source"] for i in view.items("a heron over the marsh", limit=3)] == ["style", "book/story", "story"]
    assert [i["source"] for i in view.items("what does Bo do at the shores", limit=2)] == ["style", "book/entity:bo"]
    sources = [i["source"] for i in view.items("heron mara")]
    assert sources.count("book/story") == 1 and "entity:mara" in sources
    assert not any("/" in i["source"] for i in mine.view().items("heron"))


def test_found_by_name_by_content_and_in_wg_worlds(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """02 H-4: links are resolved lazily from worlds/, WG_WORLDS and beside the world's file."""
    (project / "worlds" / "book").rename(project / "worlds" / "renamed")
    assert stub(project / "s", links=[LINK]).end_world("book").title == "The Book"
    (project / "elsewhere").mkdir()
    (project / "worlds" / "renamed").rename(project / "elsewhere" / "book")
    monkeypatch.setenv("WG_WORLDS", str(project / "elsewhere"))
    assert stub(project / "s", links=[LINK]).end_world("book").title == "The Book"
    monkeypatch.delenv("WG_WORLDS")
    stub(project / "s", "near", links=[LINK]).save_config(project / "elsewhere" / "near.yaml")
    assert World.from_yaml(project / "elsewhere" / "near.yaml").end_world("book").title == "The Book"
    text = "kind: end_world\nworld_id: book\ntitle: A file\ncontent: {story: Long ago.}\n"
    (project / "worlds" / "some.yaml").write_text(text)
    assert stub(project / "s", links=[LINK]).end_world("book").title == "A file"
    mine = EndWorld("book", {"story": "In code."}, title="Mine")
    world = stub(project / "s", links=[LINK])
    world.link(mine)
    assert world.end_world("book") is mine


def test_a_missing_link_warns_and_fails_only_when_it_is_opened(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """02 H-4."""
    world = stub(project / "s", links=[{**LINK, "target_id": "lost"}, {"target_kind": "world", "target_id": "x"}])
    assert [(i.code, i.severity) for i in world.validate().issues] == [("LINK_UNRESOLVED", "warning")]
    with caplog.at_level(logging.WARNING):
        world.step()
    assert "'lost' is not found" in caplog.text
    with pytest.raises(ConfigError, match="'lost' is not found in worlds"):
        world.end_world("lost")


def test_it_neither_runs_nor_changes(project: Path) -> None:
    """04 X-49: every way to run or change it raises; what is public and left reads."""
    book = EndWorld.load(project / "worlds" / "book")
    before = fingerprint(project / "worlds" / "book")
    for name in (
        "step",
        "run",
        "evolve",
        "begin",
        "run_stage",
        "commit",
        "fork",
        "save_checkpoint",
        "load_from_checkpoint",
    ):
        with pytest.raises(EndWorldError, match="read, never run or written"):
            getattr(book, name)()
    for name in ("content", "title", "world_id", "anything"):
        with pytest.raises(EndWorldError, match="never changes"):
            setattr(book, name, 1)
        with pytest.raises(EndWorldError, match="never changes"):
            delattr(book, name)
    mutators = ("add_", "set_", "put", "apply", "update", "remove")
    for thing in (book, book.content, book.view()):
        public = [n for n, _ in inspect.getmembers(thing) if not n.startswith("_")]
        assert not [n for n in public if n.startswith(mutators)]
    book.content.records("entity")[0]["fields"]["name"] = "Changed"
    assert book.content.get("entity", "ada")["fields"]["name"] == "Ada"  # type: ignore[index]
    copied = EndWorld.load(book.save(project / "copy"))
    assert copied.content.to_json() == book.content.to_json() and copied.verify() == []
    assert fingerprint(project / "worlds" / "book") == before == fingerprint(project / "copy")


def test_altered_bytes_are_found(project: Path) -> None:
    """04 X-49: content whose hash differs is never read as if it were true."""
    folder = project / "worlds" / "book"
    book = EndWorld.load(folder)
    sha = book.content.artifact_ids[0]
    (folder / "blobs" / sha[:2] / sha[2:4] / sha).write_bytes(b"other")
    assert [p for p in EndWorld.load(folder).verify() if p.startswith("artifact")]
    text = (folder / "end_world.yaml").read_text()
    (folder / "end_world.yaml").write_text(text.replace("root: ", "root: 0")[:-2] + "\n")
    with pytest.raises((CorruptSnapshotError, ConfigError)):
        EndWorld.load(folder)
    with pytest.raises(ConfigError, match="blobs lie beside the file"):
        EndWorld.from_yaml_text(f"kind: end_world\nworld_id: book\ncontent: {{root: {'0' * 64}}}\n")


def test_a_file_with_content_only(project: Path) -> None:
    """03 W-17: an End World may be one hand-written file; it survives the round trip through config and folder."""
    book = EndWorld.from_yaml_text("kind: end_world\nworld_id: tale\ncontent: {story: Long ago., characters: [Mara]}\n")
    assert book.content.story == "Long ago." and book.content.ids("entity") == ["mara"]
    assert EndWorld.from_config(book.to_config()).to_config() == book.to_config()
    assert EndWorld.load(book.save(project / "tale")).content.to_json() == book.content.to_json()
    with pytest.raises(ConfigError, match="execution"):
        EndWorld.from_yaml_text("kind: end_world\nworld_id: tale\nexecution: {}\ncontent: {}\n")

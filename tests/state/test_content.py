"""World content: seeds, apply, provenance, storage by parts, and the view."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from publisher import full_state
from test_state import changes, texts

from wg_core.errors import ConfigError, CorruptSnapshotError, SnapshotConflictError
from wg_core.state.blobs import MemoryBlobs
from wg_core.state.canonical import canonical_bytes
from wg_core.state.chain import PAGE
from wg_core.state.content import KINDS, WorldContent, apply
from wg_core.state.state import State

SEED = {
    "description": "A harbour town between tides.",
    "style": "short, salty sentences",
    "story": "The sea took the old town.",
    "rules": ["Nobody sails at night.", {"id": "tide", "text": "The tide comes twice a day."}],
    "characters": [{"id": "mara", "name": "Mara", "description": "keeper of the lighthouse"}, "Old Ben"],
    "places": [{"name": "North Pier", "description": "stones and nets"}],
    "glossary": {"Spring tide": "the highest water"},
    "links": [{"target_kind": "world", "target_id": "deep"}],
}
BY = "w/world_update"


class CountingBlobs(MemoryBlobs):
    """Blobs in memory that count what is written."""

    def __init__(self):
        super().__init__()
        self.puts = 0

    def put(self, data):
        self.puts += 1
        return super().put(data)


def state_with(changes, narrative="it happened", n=0):
    blobs = MemoryBlobs()
    return full_state(blobs, n).put("outcome", {"narrative": narrative, "changes": changes})


def everything(content):
    return {name: part.value for name, part in content.parts()}


def test_from_seed():
    """W-17: the content field of a world file, with ids made from names where none are given."""
    content = WorldContent.from_seed(SEED)
    assert content.ids("entity") == ["mara", "old_ben"] and content.ids("place") == ["north_pier"]
    assert content.ids("rule") == ["rule_1", "tide"] and content.ids("term") == ["spring_tide"]
    assert content.rules == ["Nobody sails at night.", "The tide comes twice a day."]
    assert content.get("term", "spring_tide")["fields"] == {"name": "Spring tide", "text": "the highest water"}
    assert content.get("entity", "nobody") is None and content.links[0]["target_id"] == "deep"
    assert content.style == "short, salty sentences" and content.chronicle() == []
    assert WorldContent.from_seed({}).ids("entity") == []


@pytest.mark.parametrize(
    ("seed", "named"),
    [
        ({"charcters": []}, "content.charcters.*did you mean 'characters'"),
        ({"characters": {"mara": {}}}, "content.characters: a list is needed, not dict"),
        ({"characters": [{"description": "x"}]}, r"content.characters\[0\]: an id"),
        ({"characters": [{"id": "a"}, {"id": "a"}]}, r"content.characters\[1\]: the id 'a' is taken"),
        ({"characters": [3]}, r"content.characters\[0\]: a mapping"),
        ({"rules": [{"id": "r"}]}, r"content.rules\[0\]: a rule needs its text"),
        ({"style": ["x"]}, "content.style: a text is needed, not list"),
        ({"places": [{"id": "p", "depth": float("nan")}]}, r"content.places\[0\].depth: nan"),
        ({"media": "x.png"}, "content.media: a list is needed"),
    ],
)
def test_bad_seeds(seed, named):
    with pytest.raises(ConfigError, match=named):
        WorldContent.from_seed(seed)


def test_apply_and_provenance():
    """C-1, C-2: a full state goes into the chronicle and the records; every field names step and maker."""
    start = WorldContent.from_seed(SEED)
    first = apply(
        start,
        state_with(
            [
                {"op": "update", "kind": "entity", "id": "mara", "fields": {"mood": "glad"}},
                {"op": "add", "kind": "place", "id": "cave", "fields": {"name": "Cave"}},
                {"op": "retire", "kind": "rule", "id": "tide"},
            ]
        ),
        step=3,
        made_by=BY,
    )
    mara = first.get("entity", "mara")
    assert mara["fields"] == {"name": "Mara", "description": "keeper of the lighthouse", "mood": "glad"}
    assert first.why("entity", "mara", "mood") == {"step": 3, "made_by": BY}
    assert first.why("entity", "mara", "name") == {"step": 0, "made_by": "world file"}
    assert first.why("place", "cave") == {"step": 3, "made_by": BY} and first.why("place", "nowhere") is None
    assert first.rules == ["Nobody sails at night."] and first.get("rule", "tide")["retired"]
    assert first.ids("rule", retired=True) == ["rule_1", "tide"]
    (entry,) = first.chronicle()
    assert entry["step"] == 3 and entry["made_by"] == BY and len(entry["changes"]) == 3 and entry["refused"] == []
    (artifact,) = first.artifact_ids
    assert entry["artifacts"] == [artifact]
    assert first.artifact(artifact)["descriptions"] == [{"step": 3, "text": "a shore", "facts": {"land": 0.5}}]
    assert start.diff(first) == {
        "entity": {"changed": ["mara"]},
        "place": {"added": ["cave"]},
        "rule": {"changed": ["tide"]},
        "artifact": {"added": [artifact]},
        "chronicle": {"entries": [0, 1]},
    }
    assert start.chronicle() == [] and "mood" not in start.get("entity", "mara")["fields"]


def test_bad_changes_are_recorded_not_fatal():
    """C-1: a change that cannot be made is refused in the chronicle with its reason; the good ones are made."""
    bad = [
        {"op": "add", "kind": "entity", "id": "mara"},
        {"op": "update", "kind": "entity", "id": "ghost", "fields": {"x": 1}},
        {"op": "retire", "kind": "place", "id": "mara"},
        {"op": "add", "kind": "place", "id": " pier"},
        {"op": "add", "kind": "term", "id": "big", "fields": {"text": "x" * 300_000}},
        {"op": "retire", "kind": "rule", "id": "tide"},
        {"op": "update", "kind": "rule", "id": "tide", "fields": {"text": "none"}},
        {"op": "add", "kind": "rule", "id": "tide", "fields": {"text": "again"}},
    ]
    content = apply(WorldContent.from_seed(SEED), state_with(bad), step=0, made_by=BY)
    (entry,) = content.chronicle()
    assert [change["op"] for change in entry["changes"]] == ["retire"]
    assert [r["reason"] for r in entry["refused"]] == [
        "entity 'mara' exists; update it, or add under a new id",
        "there is no entity 'ghost'",
        "there is no place 'mara'",
        "place id ' pier' has blanks around it or unprintable characters",
        entry["refused"][4]["reason"],
        "rule 'tide' was retired",
        "rule 'tide' was retired; add under a new id",
    ]
    assert "300" in entry["refused"][4]["reason"] and entry["refused"][0]["change"]["id"] == "mara"
    assert content.get("rule", "tide")["fields"]["text"] == "The tide comes twice a day."


def test_apply_refuses_incomplete_and_twice():
    """C-1: only a full state is applied, and the same state at the same step once."""
    content = WorldContent.from_seed(SEED)
    full = state_with([])
    with pytest.raises(ConfigError, match="blocks 1, 5 are empty"):
        apply(content, State.of({b: full.get(b) for b in (2, 3, 4)}), step=0, made_by=BY)
    once = apply(content, full, step=0, made_by=BY)
    with pytest.raises(SnapshotConflictError, match="applied at step 0 already"):
        apply(once, full, step=0, made_by=BY)
    assert apply(once, full, step=1, made_by=BY).chronicle_length == 2


steps = st.lists(st.tuples(st.lists(changes, max_size=4), texts.filter(str.strip)), min_size=1, max_size=4)


@given(steps)
@settings(max_examples=40, deadline=None)
def test_apply_is_pure_and_survives_storage(course):
    """C-1: apply changes nothing it was given, is repeatable, and commutes with saving and loading."""
    blobs, other = MemoryBlobs(), MemoryBlobs()
    live = stored = WorldContent.from_seed({"characters": ["a"]})
    for step, (wanted, narrative) in enumerate(course):
        state = state_with(wanted, narrative, step)
        before, before_hash = everything(live), state.hash()
        root = live.save(other)
        after = apply(live, state, step=step, made_by=BY)
        assert everything(live) == before and state.hash() == before_hash and live.save(MemoryBlobs()) == root
        assert everything(apply(live, state, step=step, made_by=BY)) == everything(after)
        live = after
        stored = WorldContent.load(blobs, apply(stored, state, step=step, made_by=BY).save(blobs))
    assert everything(stored) == everything(live)
    assert stored.save(MemoryBlobs()) == live.save(MemoryBlobs()) == live.save(blobs)
    entry = live.chronicle()[-1]
    assert len(entry["changes"]) + len(entry["refused"]) == len(course[-1][0])


def changing(*ids, n=0):
    return state_with([{"op": "update", "kind": "entity", "id": i, "fields": {"n": n}} for i in ids], f"event {n}", n)


def test_a_step_writes_what_changed_and_no_more():
    """C-1: one blob per entity and one for the step, whose size depends on neither the world's size nor its age."""
    blobs = CountingBlobs()
    seed = {"characters": [{"id": f"c{i}"} for i in range(500)]}
    content = WorldContent.from_seed(seed)
    content.save(blobs)
    assert blobs.puts == 503  # records, texts, lists, the first link
    sizes = []
    for step in range(300):
        blobs.puts = 0
        content = apply(content, changing("c7", n=step), step=step, made_by=BY)
        root = content.save(blobs)
        assert blobs.puts == 3  # the entity, the artifact, the link
        sizes.append(len(blobs.get(root)) - len(canonical_bytes(content.chronicle(-1)[0])))
        assert content.save(blobs) == root and blobs.puts == 3
    assert max(sizes) < 2048 and sizes[-1] - sizes[1] < 100
    counted = Reads(blobs)
    loaded = WorldContent.load(counted, root)
    assert loaded.get("entity", "c7")["fields"]["n"] == 299 and counted.reads < 1 + 800 / PAGE + 3
    assert [e["step"] for e in loaded.chronicle(-3)] == [297, 298, 299] and loaded.chronicle_length == 300
    assert len(loaded.artifact_ids) == len(set(content.artifact_ids)) and loaded.to_json() == content.to_json()


@given(st.lists(st.tuples(st.integers(0, 3 * PAGE), st.integers(0, 40)), max_size=12))
@settings(max_examples=40, deadline=None)
def test_any_course_of_growth_is_found_again(course):
    """C-1: however fast records come and change, all are found in their order from the last link."""
    blobs = MemoryBlobs()
    content = WorldContent.from_seed({"rules": ["one"]})
    for step, (more, changed) in enumerate(course):
        here = content.ids("place")
        wanted = [{"op": "add", "kind": "place", "id": f"p{step}_{i}"} for i in range(more)]
        wanted += [{"op": "update", "kind": "place", "id": i, "fields": {"n": step}} for i in here[changed : changed + 3]]
        content = apply(content, state_with(wanted, n=step), step=step, made_by=BY)
        loaded = WorldContent.load(blobs, content.save(blobs))
        assert loaded.ids("place") == content.ids("place") == [*here, *(f"p{step}_{i}" for i in range(more))]
        assert loaded.to_json() == content.to_json()


class Reads:
    """Blobs that count what is read."""

    def __init__(self, blobs):
        self.blobs, self.reads = blobs, 0

    def get(self, sha):
        self.reads += 1
        return self.blobs.get(sha)


def old_form(content, blobs):
    """The root of a content as version 1.0 stored it: lists of hashes, and the chronicle in segments."""
    parts = {name: part.save(blobs) for name, part in content.parts()}
    entries = content.chronicle()
    segments = []
    for i in range(0, len(entries), 256):
        some = entries[i : i + 256]
        segments.append([blobs.put(canonical_bytes({"entries": some})), len(some), some[0]["step"], some[-1]["step"]])
    root = {
        "schema_version": "1.0", "texts": parts["texts"], "lists": parts["lists"], "chronicle": segments,
        "kinds": {k: [[i, parts[f"{k}:{i}"]] for i in content.ids(k, retired=True)] for k in KINDS},
        "artifacts": [[i, parts[f"artifact:{i}"]] for i in content.artifact_ids],
    }  # fmt: skip
    return blobs.put(canonical_bytes(root))


def test_contents_of_version_1_are_read_and_gone_on_from():
    """C-4, 02 S-6: an older content is read as it is, and the next step is written after it."""
    blobs, other = MemoryBlobs(), MemoryBlobs()
    content = WorldContent.from_seed(SEED)
    for step in range(260):
        content = apply(content, changing("mara", n=step), step=step, made_by=BY)
    root = old_form(content, blobs)
    old = WorldContent.load(blobs, root)
    assert old.to_json() == content.to_json() and old.save(blobs) == root
    assert [e["step"] for e in old.chronicle(254, 258)] == [254, 255, 256, 257]
    assert old.applied(changing("mara", n=7).hash(), 7) and not old.applied(changing("mara", n=7).hash(), 8)
    with pytest.raises(SnapshotConflictError):
        apply(old, changing("mara", n=259), step=259, made_by=BY)
    after = apply(old, changing("mara", n=260), step=260, made_by=BY)
    again = WorldContent.load(blobs, after.save(blobs))
    assert again.to_json() == apply(content, changing("mara", n=260), step=260, made_by=BY).to_json()
    assert again.save(other) == after.save(blobs)
    assert WorldContent.load(other, again.save(other)).to_json() == again.to_json()


def test_a_newer_content_is_refused_by_name():
    """02 S-6: what a newer version wrote is not read as something else."""
    blobs = MemoryBlobs()
    value = {"content_step": {"schema_version": "3.0"}}
    with pytest.raises(ConfigError, match=r"schema version '3\.0'"):
        WorldContent.load(blobs, blobs.put(canonical_bytes(value)))


def test_load_refuses_other_bytes():
    """C-5: a blob that is missing or of another form is CorruptSnapshotError, never wrong data."""
    blobs = MemoryBlobs()
    for data in (b"not json", b"[]", b"{}", b'{"schema_version":"1.0"}', b"null"):
        with pytest.raises(CorruptSnapshotError):
            WorldContent.load(blobs, blobs.put(data))
    content = WorldContent.from_seed(SEED)
    root = content.save(blobs)
    partial = MemoryBlobs()
    partial.put(blobs.get(root))
    loaded = WorldContent.load(partial, root)
    with pytest.raises(CorruptSnapshotError, match="not in this run's memory"):
        loaded.ids("entity")
    with pytest.raises(ConfigError, match="no kind 'god'"):
        content.ids("god")


def test_view_ranks_whole_items():
    """W-27, C-3: style and rules, what happened last, then what is relevant to the query; items are whole."""
    content = WorldContent.from_seed(SEED)
    for step in range(5):
        content = apply(content, state_with([], f"event {step}", step), step=step, made_by=BY)
    view = content.view()
    items = view.items("What does the lighthouse keeper see?")
    sources = [item["source"] for item in items]
    assert sources[:6] == ["style", "rule:rule_1", "rule:tide", "description", "chronicle:2", "chronicle:3"]
    assert sources[7] == "entity:mara" and "entity:old_ben" not in sources
    assert "keeper of the lighthouse" in items[7]["text"]
    assert view.items("highest water")[7]["source"] == "term:spring_tide"
    rest = {item["source"] for item in view.items()[7:]}
    old = {"chronicle:0", "chronicle:1"}
    assert rest == {"entity:mara", "entity:old_ben", "place:north_pier", "term:spring_tide", "story"} | old
    assert view.items("what was event 1")[7]["source"] == "chronicle:1"
    assert view.items("zzz") == view.items() and view.items("x", limit=2) == items[:2]
    assert all(not isinstance(v, dict) for item in items for v in item.values())


def test_view_is_read_only_and_forgets_the_retired():
    """W-7, W-27: a view gives copies; retired things are not told."""
    content = WorldContent.from_seed(SEED)
    view = content.view()
    view.read("entity", "mara")["fields"]["name"] = "X"
    view.rules.clear()
    assert view.read("entity", "mara")["fields"]["name"] == "Mara" and len(view.rules) == 2
    gone = apply(content, state_with([{"op": "retire", "kind": "entity", "id": "mara"}]), step=0, made_by=BY).view()
    assert gone.entity_ids == ["old_ben"] and gone.place_ids == ["north_pier"]
    assert view.entity_ids == ["mara", "old_ben"]
    assert "entity:mara" not in {item["source"] for item in gone.items("keeper of the lighthouse")}
    assert gone.last(1)[0]["narrative"] == "it happened" and gone.last(0) == [] and len(gone.last(9)) == 1


def test_view_quotes_linked_worlds():
    """C-3: passages of linked worlds are ranked with the world's own, under their world's name."""
    deep = WorldContent.from_seed({"characters": [{"id": "kraken", "description": "sleeps below the reef"}]})
    items = WorldContent.from_seed(SEED).view(linked={"deep": deep}).items("what sleeps below the reef")
    assert "deep/entity:kraken" in {item["source"] for item in items}

"""Examples for training: from a history, a text and a wiki export; the split, and the checks before a training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from wg_blocks.corpus import MOST_PAGES, from_text, from_wiki, pages, passages, plain_text
from wg_blocks.examples import HELD_OUT, TRAIN, Examples, from_history, make, near_equal
from wg_blocks.examples_check import checks, must_pass, must_suffice
from wg_core import World
from wg_core.errors import ConfigError
from wg_core.state.store import SnapshotStore

PATH = "author/write/write/llm"


def draft(step: int, answer: str | None = None, **more: Any) -> dict[str, Any]:
    """A row without `split`; its answer is drawn by its step."""
    words = random.Random(step).choices([f"word{i}" for i in range(300)], k=30)
    row = {"world_id": "tide", "step": step, "stage": "author", "path": PATH, "schema": None}
    row["messages"] = [{"role": "user", "content": f"What happened on day {step}?"}]
    return {**row, "answer": " ".join(words) if answer is None else answer, **more}


def table(units: int = 10) -> Examples:
    return make([draft(step) for step in range(units)])


def test_the_split_is_by_step_and_by_seed_alone() -> None:
    """03 L-5: whole units are held out, the same ones whatever the order of the rows."""
    rows = [
        draft(step, f"{n} {random.Random(step * 9 + n).random()} tells of it") for step in range(10) for n in range(3)
    ]
    first, again = make(rows, held_out=0.3, seed=5), make(rows[::-1], held_out=0.3, seed=5)
    sides = {row["step"]: row["split"] for row in first.rows}
    assert sides == {row["step"]: row["split"] for row in again.rows}
    assert sorted(sides.values()) == [HELD_OUT] * 3 + [TRAIN] * 7
    assert len({(row["step"], row["split"]) for row in first.rows}) == 10
    assert {r["step"] for r in first.split(HELD_OUT)} != {
        r["step"] for r in make(rows, held_out=0.3, seed=6).split(HELD_OUT)
    }
    assert {row["split"] for row in make(rows[:6], held_out=0.01).rows} == {TRAIN, HELD_OUT}
    with pytest.raises(ConfigError, match="held_out: 1 is not between 0 and 1"):
        make(rows, held_out=1)


def test_empty_repeated_and_near_equal_rows_are_left_out() -> None:
    """03 L-5: what would leak into the held-out part, or says nothing, is not trained on; the numbers are kept."""
    rows = [draft(step) for step in range(10)]
    held = make(rows).split(HELD_OUT)[0]
    train = make(rows).split(TRAIN)[0]
    echo = {**draft(train["step"]), "answer": held["answer"] + " again"}
    made = make([*rows, draft(3, "  "), dict(rows[2]), echo])
    assert made.left_out == {"empty": 1, "repeated": 1, "near-equal to a held-out row": 1}
    assert len(made.rows) == 10 and not near_equal(made.rows)
    assert made.summary()["train"] == 8 and made.summary()["steps"] == [0, 9]


def test_a_table_is_read_again_as_it_was(tmp_path: Path) -> None:
    """03 L-5."""
    made = table()
    file = made.save(tmp_path / "examples.jsonl")
    assert Examples.load(file).rows == made.rows and Examples.load(file).hash == made.hash
    odd = Examples([{**made.rows[0], "answer": "The lamp\u2028is lit\x85at\x1cdusk."}])  # line ends of other kinds
    assert Examples.load(odd.save(tmp_path / "odd.jsonl")).rows == odd.rows
    file.write_text(file.read_text() + "[1]\n")
    with pytest.raises(ConfigError, match=r"examples\.jsonl:11: a row is an object, not list"):
        Examples.load(file)


BROKEN = {
    "columns": {"colour": "red"},
    "ids": {"stage": "architect"},
    "steps": {"step": -1},
    "splits": {"split": "some"},
    "messages": {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]},
    "answers": {"answer": " \n"},
    "schemas": {"schema": "object"},
    "script": {"answer": "Этот ответ написан другими буквами."},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_names_its_row(name: str) -> None:
    """03 L-5: types, ranges, no empty text, one script; the error names the row."""
    made = table()
    assert all(check.passed for check in checks(made)) and len(checks(made)) == 11
    rows = [dict(row) for row in made.rows]
    rows[4].update(BROKEN[name])
    failed = {check.name: check for check in checks(Examples(rows)) if not check.passed}
    assert [f["row"] for f in failed[name].failures] == [4]
    with pytest.raises(ConfigError, match=rf"(?s)cannot train a model.*{name} \(.*row 4 \(step "):
        must_pass(checks(Examples(rows)))


def test_leakage_and_repeats_are_found() -> None:
    """03 L-5: no row twice, no unit on both sides, no training answer near-equal to a held-out one."""
    made = table()
    held, train = made.split(HELD_OUT)[0], made.split(TRAIN)[0]
    rows = [
        *made.rows,
        dict(train),
        {**held, "split": TRAIN},
        {**draft(77), "split": TRAIN, "answer": held["answer"] + " so"},
    ]
    failed = {check.name: [f["row"] for f in check.failures] for check in checks(Examples(rows)) if not check.passed}
    assert {name: set(found) & {10, 11, 12} for name, found in failed.items()} == {
        "duplicates": {10, 11}, "leaking_steps": {11}, "leaking_texts": {11, 12}
    }  # fmt: skip


def test_too_few_examples_say_how_many_and_how_to_get_more() -> None:
    with pytest.raises(
        ConfigError, match=r"too few examples: 8 to train on and 2 held out, but at least 20 .*; wg run tide"
    ):
        must_suffice(table(), 20, "wg run tide --steps 10")
    with pytest.raises(ConfigError, match="too few examples: 0 to train on and 0 held out"):
        must_suffice(Examples([]), 1)


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_a_text_becomes_passages_without_overlap(tmp_path: Path) -> None:
    """03 L-5: every sentence is in one passage, and a section is the unit of the split."""
    sentences = [f"On day {n} the ferry boy counted {n} gulls on the long black pier before noon." for n in range(195)]
    paragraphs = [" ".join(sentences[i : i + 5]) for i in range(0, 195, 5)]
    file = tmp_path / "chronicle.txt"
    file.write_text("# A remark that is no part of it\n\n" + "\n\n".join(paragraphs), encoding="utf-8")
    rows = list(from_text(file, world_id="tide", path=PATH))
    assert " ".join(row["answer"] for row in rows) == " ".join(sentences)
    assert all(40 <= len(row["answer"].split()) <= 130 for row in rows)
    answers = {step: [r["answer"] for r in rows if r["step"] == step] for step in {r["step"] for r in rows}}
    for row in rows:
        asked = row["messages"][0]["content"]
        others = [a for step, texts in answers.items() if step != row["step"] for a in texts]
        assert not any(text in asked for text in others) and row["answer"] not in asked
    assert sum(row["messages"][0]["content"].startswith("So far") for row in rows) == len(rows) - len(answers)
    must_pass(checks(make(rows)))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-8 at byte 0"):
        list(from_text(file, world_id="tide", path=PATH))


def test_a_short_text_and_a_quote_at_the_end_of_a_sentence() -> None:
    assert list(passages("Too short.")) == []
    text = " ".join(f'He said number {n}: "It is the tide." Then he went home.' for n in range(12))
    assert " ".join(passages(text)) == text


def test_a_text_without_ends_of_sentences_is_cut() -> None:
    """03 L-5: a list, verse without stops, and letters without spaces give passages too, with nothing lost."""
    words = " ".join(f"line{n}" for n in range(2000))
    signs = "".join(chr(0x4E00 + n) for n in range(6000))
    stopped = "".join(f"{signs[n : n + 60]}。" for n in range(0, 6000, 60))
    for text in (words, signs, stopped):
        found = list(passages(text))
        assert len(found) > 3 and all(len(piece) < 1500 for piece in found)
        assert text.replace(" ", "").startswith("".join(found).replace(" ", ""))
    assert len(list(passages(words))) > 20


EXPORT = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">
 <siteinfo><sitename>Trial</sitename></siteinfo>
 <page><title>The Pier</title><ns>0</ns><id>1</id><revision><id>9</id><text>old text</text></revision>
  <revision><id>10</id><text>{{Infobox|a=b}}'''The Pier''' is of [[oak|black oak]].&lt;ref&gt;a book&lt;/ref&gt; WORDS
== Storms ==
[[File:pier.png|thumb|A pier]] It was rebuilt. WORDS [[Category:Piers]]</text></revision></page>
 <page><title>Jetty</title><ns>0</ns><redirect title="The Pier"/><revision><text>#REDIRECT [[The Pier]]</text></revision></page>
 <page><title>Talk:The Pier</title><ns>1</ns><revision><text>WORDS</text></revision></page>
 <page><title>Gull Rock</title><ns>0</ns><revision><text>WORDS</text></revision></page>
</mediawiki>"""


def export(file: Path, text: str = EXPORT) -> Path:
    words = " ".join(f"The keeper lit lamp {n} at dusk and wrote it down." for n in range(8))
    file.write_text(text.replace("WORDS", words), encoding="utf-8")
    return file


def test_a_wiki_export_becomes_rows_of_its_articles(tmp_path: Path) -> None:
    """03 L-5: prose of the last revision; no redirects, other name spaces, templates, references or files."""
    rows = list(from_wiki(export(tmp_path / "wiki.xml"), world_id="tide", path=PATH))
    assert {row["step"] for row in rows} == {0, 1}
    told = " ".join(row["answer"] for row in rows if row["step"] == 0)
    assert told.startswith("The Pier is of black oak. The keeper lit lamp 0") and "It was rebuilt." in told
    for wrong in ("Infobox", "a book", "thumb", "Category", "old text", "==", "Storms", "REDIRECT"):
        assert wrong not in told
    assert rows[0]["messages"][0]["content"] == "Begin to tell of The Pier."
    assert plain_text("a {{b|{{c}}}} [http://x y] ''d''").split() == ["a", "y", "d"]
    nested = "'''a<ref>no</ref>'''\n* b ''c<ref name=x>{{no}}</ref>'' <div>[[File:no.png|no]] d</div><br/> <ref name=x/>e"
    assert plain_text(nested).split() == ["a", "b", "c", "d", "e"]


def test_an_export_cannot_do_harm(tmp_path: Path) -> None:
    """Safety: no entities, nothing but an export, and limits."""
    bomb = (
        '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><mediawiki><page><title>&b;</title></page></mediawiki>'
    )
    outside = (
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><mediawiki><page><title>&a;</title></page></mediawiki>'
    )
    for text in (bomb, outside):
        with pytest.raises(ConfigError, match="document type or entities"):
            list(from_wiki(export(tmp_path / "bad.xml", text), world_id="tide", path=PATH))
    with pytest.raises(ConfigError, match="the root is <html>, not <mediawiki>"):
        list(from_wiki(export(tmp_path / "bad.xml", "<html/>"), world_id="tide", path=PATH))
    with pytest.raises(ConfigError, match="no well-formed XML"):
        list(from_wiki(export(tmp_path / "bad.xml", "<mediawiki><page>"), world_id="tide", path=PATH))
    many = "<page><title>a</title><ns>0</ns><revision><text>b</text></revision></page>" * (MOST_PAGES + 1)
    with pytest.raises(ConfigError, match=f"more than {MOST_PAGES} articles"):
        for _ in pages(export(tmp_path / "bad.xml", f"<mediawiki>{many}</mediawiki>")):
            pass


# ---- a history -------------------------------------------------------------------------------------------------------


def test_a_stub_world_has_nothing_that_can_learn(tmp_path: Path) -> None:
    world = World.from_template("stub", world_id="tide", seed=1)
    world.set_storage(SnapshotStore(tmp_path))
    world.step()
    assert list(from_history(world)) == []
    with pytest.raises(ConfigError, match="stage 'author' of 'tide' has no model that can learn"):
        list(from_history(world, stages=["author"]))
    assert json.dumps(make([]).summary())

"""Ids, the door from ids to paths, and links."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from wg_core.errors import ConfigError, did_you_mean
from wg_core.structure.hyperlink import HyperEdge, HyperLink
from wg_core.structure.ids import check_id, safe_path


@pytest.mark.parametrize("good", ["a", "_", "A9_z", "x" * 64])
def test_legal_ids(good: str) -> None:
    """02 G-10 as ruled."""
    assert check_id(good) == good


@pytest.mark.parametrize("bad", ["", "9a", "a-b", "a.b", "a/b", "a:b", "..", "a\n", "a ", "é", "x" * 65, None, 3])
def test_illegal_ids_are_named(bad: object) -> None:
    """02 G-10, 01 A-2: ConfigError shows the id and what is legal."""
    with pytest.raises(ConfigError, match=r"bad world id .*use a letter or '_' first"):
        check_id(bad, "world id")


def test_a_long_id_is_shown_short() -> None:
    with pytest.raises(ConfigError) as caught:
        check_id("x" * 10_000)
    assert len(str(caught.value)) < 300


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3))
def test_a_path_never_leaves_its_root(parts: list[str]) -> None:
    """Design 2.13: one function turns ids into paths inside a root."""
    root = Path("/tmp/some_root").resolve()
    try:
        path = safe_path(root, *parts)
    except (ConfigError, ValueError):
        return
    assert path == root or root in path.parents


@pytest.mark.parametrize("parts", [("..",), ("a", "..", ".."), ("/etc/passwd",), ("../some_root_2",)])
def test_a_path_that_leaves_is_refused(parts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves its root folder"):
        safe_path(tmp_path, *parts)


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "away").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="leaves its root folder"):
        safe_path(root, "away", "secret")


def test_near_spellings() -> None:
    """01 F-1: a wrong name is met with the nearest valid ones."""
    assert did_you_mean("outptu", ["output", "width"]) == "did you mean 'output'?"
    assert did_you_mean("zzz", ["b", "a"]) == "known: 'a', 'b'"
    assert did_you_mean("zzz", []) == "there are none"
    assert did_you_mean("zzz", [f"n{i:02}" for i in range(20)]).endswith("'n11', ...")


def test_links_and_hyperedges_are_closed_values() -> None:
    """01 F-56, design: `HyperLink {target_kind, target_id, fragment?, rel?, meta?}`."""
    link = HyperLink(target_kind="world", target_id="tide", rel="inspired_by", meta={"n": 1})
    assert HyperLink.model_validate_json(link.model_dump_json()) == link
    with pytest.raises(ValidationError):
        HyperLink(target_kind="world", target_id="w", kind="x")  # type: ignore[call-arg]
    edge = HyperEdge.model_validate({"id": "e", "kind": "group", "members": [{"path": "a"}, {"path": "b", "port": "y"}]})
    assert [m.path for m in edge.members] == ["a", "b"]
    with pytest.raises(ValidationError):
        HyperEdge(id="e", kind="group", members=())

"""Descriptions join facts and prose of each artifact."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wg_blocks.describe import DescribeItems
from wg_core.errors import PortValueError

IDS = st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), min_size=1, max_size=5)


@given(IDS)
def test_each_fact_meets_its_text(ids: list[str]):
    facts = [{"artifact_id": sha, "land_share": n / 10} for n, sha in enumerate(ids)]
    texts = [f"Text {n}. " for n in range(len(ids))]
    items = DescribeItems().run({"facts": facts, "texts": texts}, strict_types=True)["data"]["items"]
    assert [i["artifact_id"] for i in items] == ids
    assert [i["text"] for i in items] == [t.strip() for t in texts]
    assert [i["facts"] for i in items] == [{"land_share": n / 10} for n in range(len(ids))]
    assert all("artifact_id" in f for f in facts)  # the input is as it was


def test_a_lone_text_is_one():
    data = DescribeItems().run({"facts": [{"artifact_id": "a", "kind": "map"}], "texts": "Land."})["data"]
    assert data == {"items": [{"artifact_id": "a", "text": "Land.", "facts": {"kind": "map"}}]}


@pytest.mark.parametrize(
    ("facts", "texts", "says"),
    [
        ([{"artifact_id": "a"}], ["one", "two"], "1 facts but 2 texts"),
        ([], "one", "0 facts but 1 texts"),
        ([{"land_share": 1}], "one", "no artifact_id"),
        ([{"artifact_id": "a"}], "  ", "empty"),
    ],
)
def test_what_does_not_fit_is_named(facts, texts, says):
    with pytest.raises(PortValueError, match=says):
        DescribeItems().run({"facts": facts, "texts": texts})

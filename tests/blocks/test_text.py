"""Template and world context blocks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wg_blocks.text import MAX_CHARS, Context, Template, render
from wg_core.errors import ConfigError, MissingInputError, PortError, PortValueError


def fill(template: str, values: dict[str, Any], **config: Any) -> Any:
    return Template(template=template, **config).run(values, strict_types=True)["text"]


def test_each_name_is_a_required_port_unless_listed() -> None:
    # proves 03 W-26
    block = Template(template="{{ style }} in {{place}} and {{ style }}{{ mood }}", optional=["mood"])
    assert [(p.name, p.optional) for p in block.input_ports] == [("style", False), ("place", False), ("mood", True)]
    assert block.run({"style": "calm", "place": "town"})["text"] == "calm in town and calm"
    with pytest.raises(MissingInputError, match="place"):
        block.run({"style": "x"})
    assert Template(**block.config).config == block.config


def test_values_are_never_expanded_again() -> None:
    assert fill("{{ a }}-{{ b }}", {"a": "{{ b }}", "b": "\\1 \\g<0> {{ a }}"}) == "{{ b }}-\\1 \\g<0> {{ a }}"


@given(a=st.text(), b=st.text())
def test_any_value_comes_out_as_it_went_in(a: str, b: str) -> None:
    assert fill("<{{ a }}|{{ b }}>", {"a": a, "b": b}) == f"<{a}|{b}>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ a",
        "{{ a }",
        "{ a }}",
        "{{ a.b }}",
        "{{ a | upper }}",
        "{{ 1 + 1 }}",
        "{{ A }}",
        "{{}}",
        "{{ {{ a }} }}",
        "{% x %} {{",
    ],
)
def test_anything_but_a_name_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="unbalanced braces or a bad name"):
        Template(template=template)


def test_json_in_a_template_is_plain_text() -> None:
    assert fill('{"a": {"b": {{ n }}}} {x}', {"n": 3}) == '{"a": {"b": 3}} {x}'


def test_lists_become_bullets_and_dicts_lines() -> None:
    items = ["one\n two", {"text": "three", "source": "place:x"}, {"k": 1}, 2.50, None]
    assert (
        fill("Known:\n{{ items }}\nEnd", {"items": items})
        == 'Known:\n- one two\n- three\n- {"k": 1}\n- 2.5\n- null\nEnd'
    )
    assert fill("{{ d }}", {"d": {"name": "Mara", "age": 41, "tags": ["a"], "odd: key": True}}) == (
        'name: Mara\nage: 41\ntags: ["a"]\n"odd: key": true'
    )
    assert fill("{{ d }}", {"d": {"text": "only this", "source": "s"}}) == "only this"
    seen = {"artifact_id": "ab" * 32, "facts": {"land_share": 0.25}, "text": "Land covers 25% of the map."}
    assert fill("{{ seen }}", {"seen": [seen]}) == "- Land covers 25% of the map."
    assert fill("{{ n }} {{ m }}", {"n": 3, "m": 0.1}) == "3 0.1"
    assert render([]) == ""


def test_a_line_whose_names_are_all_unset_is_left_out() -> None:
    template = "Town: {{ town }}\nMood: {{ mood }}\nNow."
    assert fill(template, {"town": "T"}, optional=["mood"]) == "Town: T\nNow."
    assert fill(template, {"town": "T", "mood": ""}, optional=["mood"]) == "Town: T\nMood: \nNow."


def test_each_gives_one_text_per_element() -> None:
    template = "{{ style }}: {{ item }}"
    texts = fill(template, {"style": "S", "item": ["a", {"text": "b", "source": "x"}, {"k": "v"}]}, each="item")
    assert texts == ["S: a", "S: b", "S: k: v"]
    assert fill(template, {"style": "S", "item": []}, each="item") == []
    with pytest.raises(PortValueError, match="takes a list"):
        Template(template=template, each="item").run({"style": "S", "item": "a"})


def test_config_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="optional names 'b'"):
        Template(template="{{ a }}", optional=["b"])
    with pytest.raises(ConfigError, match="each names 'b'"):
        Template(template="{{ a }}", each="b")
    with pytest.raises(ConfigError, match="'text' is the name of the output"):
        Template(template="{{ text }}")
    with pytest.raises(ConfigError, match="template is a text"):
        Template(template={"ref": "x"})  # type: ignore[arg-type]
    with pytest.raises(PortError):
        Template(template="{{ a }}").get_port("b")


def test_the_output_is_bounded() -> None:
    with pytest.raises(PortValueError, match="shorten 'b'"):
        fill("{{ a }}" + "{{ b }}" * 20, {"a": "x", "b": "y" * (MAX_CHARS // 20)})


class View:
    """A view of a world as the engine maps it: frozen, asked for items."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.asked: list[str] = []

    def items(self, query: str = "", rank: Any = None) -> list[dict[str, str]]:
        self.asked.append(query)
        words = set(query.lower().split())
        ranked = sorted(self.texts, key=lambda t: -len(words & set(t.lower().split())))
        return [{"text": t, "source": f"rule:{self.texts.index(t)}"} for t in ranked]


def test_world_context_passes_ranked_items_on() -> None:
    # proves 03 W-27
    view = View(["the sea is cold", "mara keeps the harbour", "bread is dear"])
    out = Context(limit=2).run({"world": view, "query": ["mara", "harbour"]}, strict_types=True)
    assert out["items"][0] == {"text": "mara keeps the harbour", "source": "rule:1"} and len(out["items"]) == 2
    assert Context().run({"world": view})["items"][0]["text"] == "the sea is cold"
    assert view.asked == ["- mara\n- harbour", ""]
    with pytest.raises(ConfigError, match="limit"):
        Context(limit=0)

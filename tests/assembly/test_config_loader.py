"""The one door for configuration text."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks_for_tests import write
from hypothesis import given
from hypothesis import strategies as st

from wg_core import ConfigError, Graph
from wg_core.assembly import loader
from wg_core.assembly.build import open_document, parse_document
from wg_core.assembly.loader import Dumper, checked, parse, read
from wg_core.assembly.models import KINDS, GraphEntry, schema_of

GRAPH = """\
kind: graph
id: g
nodes:
  - {node_id: a, block_type: test/affine, config: {scale: 2}}
exposed_inputs: [{name: x, node_id: a, port_name: x}]
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x 1\nb: 2\n", "<text>:1: anchors and aliases are not allowed; write the value out"),
        ("a: 1\nb: *x\n", "<text>:2: anchors and aliases are not allowed"),
        ("a:\n  <<: {b: 1}\n", "<text>:2: merge keys ('<<') are not allowed"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "<text>:1: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not",
        ),
        ("a: !custom 1\n", "<text>:1: tag '!custom' is not allowed; configuration is plain data"),
        ("a: !!str 1\n", "<text>:1: tag 'tag:yaml.org,2002:str' is not allowed"),
        ("a: !!binary aGk=\n", "is not allowed"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "<text>:4: b.c: this key occurs twice"),
        ("1: a\n'1': b\n", "<text>:2: 1: this key occurs twice"),
        ("? [a, b]\n: 1\n", "<text>:1: a key must be text"),
        ("a: 1\nb: .nan\n", "<text>:2: b: NaN and infinity are not allowed"),
        ("a: -.inf\n", "<text>:1: a: NaN and infinity are not allowed"),
        ("a: 1\n---\nb: 2\n", "<text>:2: a second document begins here; one file holds one document"),
        ("a: [1, 2\nb: 3\n", "not readable as YAML or JSON"),
        ("a: b: c\n", "<text>:1: not readable as YAML or JSON"),
        ("a: " + "9" * 5000 + "\n", "<text>:1: a: unreadable value"),
        ("a: 0x" + "f" * 9000 + "\n", "<text>:1: a: unreadable value: a whole number of more than 1024 bits"),
        ('{"a": "\x00"}', "not readable as YAML or JSON"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_line(text: str, says: str) -> None:
    """Design 2.13, 01 A-2: no aliases, tags, duplicate keys, NaN; file and line in every error."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100 + "]" * 100, "nested deeper than 60"),
        ("{a: " * 100 + "1" + "}" * 100, "nested deeper than 60"),
        ("\n".join("  " * i + f"k{i}:" for i in range(100)), "nested deeper than 60"),
        ("- 1\n" * 200_001, "more than 200000 values"),
        ("a: '" + "x" * loader.MAX_BYTES + "'", "the limit is 4194304"),
    ],
)
def test_bombs_are_refused(text: str, says: str) -> None:
    """Design 2.13: limits on size, depth and number."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_large_file_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with path.open("wb") as file:
        file.truncate(loader.MAX_BYTES + 1)
    with pytest.raises(ConfigError, match=r"big\.yaml: 4194305 bytes; the limit is 4194304"):
        read(path)


def test_only_plain_files_are_read() -> None:
    """Design 2.13: a device or a pipe has no end, and no size to compare with the limit."""
    for place, says in (("/dev/zero", "is no plain file; name a file"), ("/", "is a folder; name a file")):
        with pytest.raises(ConfigError, match=f"{place} {says}"):
            read(place)


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    """02 S-2: UTF-8, as editors elsewhere write it, for files of text too."""
    (tmp_path / "told.txt").write_bytes(b"\xef\xbb\xbfThe tide turns.\r\n")
    (tmp_path / "main.yaml").write_bytes(b"\xef\xbb\xbfa: {ref: told.txt}\r\n")
    assert read(tmp_path / "main.yaml").data == {"a": "The tide turns.\n"}


def test_a_long_comment_is_read_at_once() -> None:
    """Design 2.13: a file within the limit does not hold the reader up; slow only where JSON escapes ask for it."""
    assert issubclass(loader._FastLoader, yaml.CSafeLoader)
    assert parse("# " + "x" * 3_000_000 + "\na: 1\n").data == {"a": 1}
    with pytest.raises(ConfigError, match="<text>:2: not readable as YAML or JSON: half of a surrogate pair"):
        parse("a: 1\nb: \ud83d\n")


def test_dates_stay_text_and_json_is_read_too() -> None:
    assert parse("a: 2024-05-01\nb: 2024-05-01 10:00:00").data == {"a": "2024-05-01", "b": "2024-05-01 10:00:00"}
    assert parse('{"a": [1, 2.5, null, true, "x"]}').data == {"a": [1, 2.5, None, True, "x"]}
    assert parse("").data is None


def test_numbers_and_characters_of_json() -> None:
    """YAML or JSON: exponents without a dot are numbers, escaped pairs are one character."""
    assert parse('{"a": 1e-4, "b": 2E3, "c": "1e5", "d": "\\ud83d\\ude00", "\\u00e9": "\\/"}').data == {
        "a": 1e-4, "b": 2000.0, "c": "1e5", "d": "\U0001f600", "é": "/",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"<text>:1: a: half of a surrogate pair"):
        parse('{"a": "\\ud83d"}')


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.text(string.printable, max_size=12) | st.sampled_from(["1e5", "no", "12:30", "2024-05-01", "~", "\U0001f600"]),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=6), below, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_plain_data_comes_back_as_it_was_written(value: Any) -> None:
    """02 G-51: what is dumped is read again, unchanged."""
    text = yaml.dump({"value": value}, Dumper=Dumper, allow_unicode=True)
    assert parse(text).data["value"] == value
    assert parse(json.dumps({"value": value})).data["value"] == value


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_but_nothing_else(text: str) -> None:
    """Design 2.13: hostile text gives ConfigError and no other exception."""
    try:
        parse(text)
    except ConfigError as error:
        assert "<text>" in str(error)


# ---- schema ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GRAPH + "edgse: []\n", "<text>:6: edgse: unknown key 'edgse'; did you mean 'edges'?"),
        (
            GRAPH.replace("block_type", "blok_type"),
            "<text>:4: nodes.0.blok_type: unknown key 'blok_type'; did you mean 'block_type'?",
        ),
        (GRAPH + "edges:\n  - {source_node: a}\n", "<text>:7: edges.0: key 'source_port' is missing"),
        (GRAPH.replace("id: g", "id: a-b"), "<text>:2: id: "),
        (GRAPH + "schema_version: '2.0'\n", "<text>:6: schema_version: this file has schema version 2.0, this engine reads 1.0"),
        (GRAPH + "schema_version: new\n", "schema_version is 'major.minor', not 'new'"),
        ("kind: graph\nid: g\nnodes: 3\n", "<text>:3: nodes: Input should be a valid list (got 3)"),
        (GRAPH.replace("config: {scale: 2}", "shares: b"), "a node names exactly one of block_type, model and shares"),
        ("- 1\n", "<text>:1: this is not a mapping with a 'kind'"),
        ("nodes: []\n", "unknown kind None; known: 'end_world', 'graph'"),
        ("kind: grpah\n", "<text>:1: kind: unknown kind 'grpah'; did you mean 'graph'?"),
        ("kind: world\n", "this is a world, a graph is needed here"),
        (GRAPH + "loops: [{loop_id: a, num_steps: 0}]\n", "<text>:6: loops.0.num_steps: "),
    ],
)  # fmt: skip
def test_schema_errors_name_line_path_and_near_misses(text: str, says: str, registry: Any) -> None:
    """02 G-51, 01 A-2: unknown keys meet near spellings."""
    with pytest.raises(ConfigError) as caught:
        Graph.from_yaml_text(text, registry=registry)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GRAPH.replace("test/affine", "test/afine"), "<text>:4: nodes.0: block type 'test/afine' is not registered; did you mean 'test/affine'"),
        (GRAPH.replace("scale", "scael"), "<text>:4: nodes.0: block 'test/affine': unknown config key 'scael'; did you mean 'scale'?"),
        (
            GRAPH + "edges:\n  - {source_node: a, source_port: y, target_node: b, target_port: x}\n",
            "<text>:7: edges.0: g has no node 'b'; known: 'a'",
        ),
        (GRAPH.replace("port_name: x", "port_name: z"), "<text>:5: exposed_inputs.0: g/a has no port 'z'; known: 'x'"),
        (GRAPH.replace("exposed_inputs", "exposed_outputs"), "<text>:5: exposed_outputs.0: g/a.x is an input where an output is needed"),
        (GRAPH.replace("block_type: test/affine, config: {scale: 2}", "shares: b"), "node 'a' shares 'b', which is no earlier node"),
        (GRAPH.replace("block_type: test/affine, config: {scale: 2}", "model: big"), "node 'a' names model 'big'; there are none"),
        (
            GRAPH.replace("config: {scale: 2}", "config: {scale: 2}, defaults: {z: 1}"),
            "<text>:4: nodes.0: g/a: default for unknown input 'z'; known: 'x'",
        ),
        (
            GRAPH.replace("exposed_inputs: [{name: x, node_id: a, port_name: x}]", "exposed_outputs: [{node_id: a, port_name: y}]")
            + "  - {node_id: b, block_type: test/affine}\nexposed_inputs: [{node_id: a, port_name: x}]\n",
            "not readable",
        ),
    ],
)  # fmt: skip
def test_errors_of_building_name_line_and_place(text: str, says: str, registry: Any) -> None:
    """02 G-51: errors name node, port, edge and file."""
    with pytest.raises(ConfigError) as caught:
        Graph.from_yaml_text(text, registry=registry)
    assert says in str(caught.value)


def test_an_invalid_structure_is_a_config_error_with_all_findings(registry: Any) -> None:
    """02 G-25: validated after building."""
    text = "kind: graph\nid: g\nnodes:\n  - {node_id: a, block_type: test/affine}\n  - {node_id: b, block_type: test/affine}\n"
    text += "exposed_inputs: [{node_id: a, port_name: x}]\n"
    with pytest.raises(ConfigError, match=r"<text>:1: .*required input b\.x has no edge.*REQUIRED_UNFED"):
        Graph.from_yaml_text(text, registry=registry)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_closed_json_schema(kind: str) -> None:
    """02: JSON Schema comes from the same models."""
    schema = schema_of(kind)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert "kind" in schema["properties"]


# ---- refs ------------------------------------------------------------------------------------------------------------


def test_refs_are_relative_nested_and_may_be_overridden(tmp_path: Path, registry: Any) -> None:
    """02 G-54."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "node.yaml").write_text("scale: {ref: number.yaml}\noffset: 1\n")
    (tmp_path / "parts" / "number.yaml").write_text("3\n")
    main = write(
        tmp_path,
        main__yaml="kind: graph\nnodes:\n  - node_id: a\n    block_type: test/affine\n"
        "    config: {ref: parts/node.yaml, overrides: {offset: 5}}\n",
    )
    assert Graph.from_yaml(main, registry=registry).run({"x": 2}) == {"y": 11}


def test_overrides_merge_deeply_and_may_refer_themselves(tmp_path: Path) -> None:
    """02 G-54."""
    main = write(
        tmp_path,
        main__yaml="a: {ref: other.yaml, overrides: {b: {d: 5}, e: {ref: text.txt}}}\n",
        other__yaml="b: {c: 1, d: 2}\ne: 3\n",
        text__txt="Hello\nworld",
    )
    assert read(main).data == {"a": {"b": {"c": 1, "d": 5}, "e": "Hello\nworld"}}


def test_text_files_give_their_text(tmp_path: Path) -> None:
    """Prompts beside the worlds that use them."""
    main = write(tmp_path, main__yaml="prompt: {ref: prompt.md}\n", prompt__md="# Title\n{{ style }}: &a *b !c\n")
    assert read(main).data == {"prompt": "# Title\n{{ style }}: &a *b !c\n"}


def test_content_is_data_never_a_reference(tmp_path: Path) -> None:
    main = write(tmp_path, main__yaml="content:\n  a: {ref: secret.yaml}\n")
    assert read(main).data == {"content": {"a": {"ref": "secret.yaml"}}}


REFS = [
    ("a: {ref: ../outside.yaml}\n", "a.ref: '../outside.yaml' leaves the folder"),
    ("a: {ref: /etc/hostname}\n", "a.ref: '/etc/hostname' leaves the folder"),
    ("a: {ref: link.yaml}\n", "a.ref: 'link.yaml' leaves the folder"),
    ("a: {ref: 'http://x/y.yaml'}\n", "a.ref: ref is the path of a file, not 'http://x/y.yaml'"),
    ("a: {ref: 3}\n", "a.ref: ref is the path of a file, not 3"),
    ("a: {ref: missing.yaml}\n", "a.ref: there is no file 'missing.yaml' (looked for "),
    ("a: {ref: main.yaml}\n", "a.ref: references go in a cycle: main.yaml -> main.yaml"),
    ("a:\n  b: {ref: loop.yaml}\n", "references go in a cycle: main.yaml -> loop.yaml -> main.yaml"),
    ("a: {ref: text.txt, overrides: {b: 1}}\n", "'text.txt' is text; only mappings take overrides"),
    ("a: {ref: latin1.md}\n", "root/latin1.md: not UTF-8 text"),
    ('a: {ref: "b\\0c"}\n', "a.ref: ref is the path of a file, not 'b\\x00c'"),
    (f"a: {{ref: {'x' * 300}}}\n", "is that of no file: a name of more than 255 bytes"),
    ("a: {ref: list.yaml, overrides: {b: 1}}\n", "overrides and the file they change are mappings"),
    ("a: {ref: deep0.yaml}\n", "references nested deeper than 20"),
    ("a: {ref: wide0.yaml}\n", "more than 1000 references, counting those in referred files"),
]


@pytest.mark.parametrize(("text", "says"), REFS)
def test_wrong_refs_are_named_with_their_place(text: str, says: str, tmp_path: Path) -> None:
    """02 G-54, 01 A-2: outside the root (links too), missing, cyclic, too deep, too many."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.yaml").write_text("1\n")
    (root / "latin1.md").write_bytes(b"caf\xe9")
    (root / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    files = {f"deep{i}__yaml": f"a: {{ref: deep{i + 1}.yaml}}\n" for i in range(30)}
    many = "\n".join(f"k{n}: {{ref: wide%d.yaml}}" for n in range(11))
    files |= {f"wide{i}__yaml": many.replace("%d", str(i + 1)) for i in range(4)} | {"wide4__yaml": "1\n"}
    main = write(root, main__yaml=text, loop__yaml="c: {ref: main.yaml}\n", text__txt="t", list__yaml="[1]\n", **files)
    with pytest.raises(ConfigError) as caught:
        read(main)
    assert says in str(caught.value)
    assert ".yaml:" in str(caught.value)


def test_errors_name_the_file_that_holds_the_mistake(tmp_path: Path) -> None:
    """02 G-51, G-54: the referred file's line; for an overridden value, the line of the override."""
    main = write(
        tmp_path,
        main__yaml="kind: graph\nnodes:\n  - ref: node.yaml\n",
        node__yaml="node_id: a\nblock_type: t/a\nconfgi: {}\n",
    )
    with pytest.raises(
        ConfigError, match=r"node\.yaml:3: nodes\.0\.confgi: unknown key 'confgi'; did you mean 'config'"
    ):
        checked(GraphEntry, open_document(main)[1])
    main = write(
        tmp_path,
        main__yaml="kind: graph\nnodes:\n  - ref: node.yaml\n    overrides:\n      node_id: a-b\n",
        node__yaml="node_id: a\nblock_type: t/a\n",
    )
    with pytest.raises(ConfigError, match=r"main\.yaml:5: nodes\.0\.node_id: "):
        checked(GraphEntry, open_document(main)[1])


@pytest.mark.parametrize("name", ["folder", "missing.yaml", "latin.yaml"])
def test_unreadable_files(name: str, tmp_path: Path) -> None:
    """01 A-2: absent files are `FileNotFoundError`, all else names the file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    expected = FileNotFoundError if name == "missing.yaml" else ConfigError
    with pytest.raises(expected, match=name):
        read(tmp_path / name)


def test_text_may_not_refer_to_files() -> None:
    """Design 3: `from_yaml_text` refuses refs."""
    with pytest.raises(ConfigError, match=r"<text>:3: nodes\.0: text may not refer to files"):
        parse_document("kind: graph\nnodes:\n  - {ref: /etc/passwd}\n")

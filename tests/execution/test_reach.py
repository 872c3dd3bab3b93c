"""What an agent's arguments may reach: folders and hosts, held to before a tool runs, against hostile arguments."""

from __future__ import annotations

import http.server
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wg_blocks.agent_scripted import ScriptedAgent
from wg_core import Block, BlockRegistry, ConfigError, Graph, Port, ValidationError
from wg_core.assembly.registry import default_registry
from wg_core.errors import NodeExecutionError, ToolError, ToolLimitError


class ReadFile(Block):
    """Reads a file."""

    ports = (Port("file", "in", "text", schema={"type": "string", "format": "path"}), Port("text", "out", "text"))
    block_type = "test/read_file"

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"text": f"{inputs['file']}: {Path(inputs['file']).read_text()}"}


class ReadFiles(ReadFile):
    """Reads files."""

    ports = (
        Port("files", "in", "list", schema={"type": "array", "items": {"type": "string", "format": "file-path"}}),
        Port("text", "out", "text"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"text": "".join(Path(f).read_text() for f in inputs["files"])}


class Fetch(Block):
    """Gets a page."""

    ports = (Port("url", "in", "text", schema={"type": "string", "format": "uri"}), Port("page", "out", "text"))

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        with urllib.request.urlopen(inputs["url"], timeout=5) as answer:
            return {"page": f"{inputs['url']}: {answer.read().decode()}"}


def run(tool: Block, arguments: dict[str, Any], **limits: Any) -> str:
    """What an agent is told that calls the tool with these arguments."""
    graph = graph_of(tool, arguments, **limits)
    return graph.run({"prompt": "go"})["response"]


def graph_of(tool: Block, arguments: dict[str, Any], **limits: Any) -> Graph:
    script = [{"tool_calls": [{"tool_id": "t", "arguments": arguments}]}, "{results}"]
    graph = Graph("g")
    graph.add_node(ScriptedAgent(script=script), "bot")
    graph.add_node(tool, "tool")
    graph.add_tool("t", "tool", **limits)
    graph.expose_input("bot", "context", "prompt")
    graph.expose_output("bot", "response", "response")
    return graph


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """open/{note.txt, deep/more.txt}, links out of it and to nowhere, and secret/key.txt beside it."""
    for name, text in (("open/note.txt", "tide"), ("open/deep/more.txt", "ebb"), ("secret/key.txt", "needle"), ("openly.txt", "needle")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for link, target in (("out", "../secret"), ("key", "../secret/key.txt"), ("loop", "loop"), ("in", "deep/more.txt"), ("new", "../made")):
        (tmp_path / "open" / link).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text"),
    [("note.txt", "tide"), ("./deep/../note.txt", "tide"), ("deep/more.txt", "ebb"), ("in", "ebb"), ("{root}/open/note.txt", "tide")],
)
def test_a_path_inside_is_given_whole(file: str, text: str, tree: Path) -> None:
    """01 E-10, 04 X-40: whatever the working folder is, the tool opens what was checked."""
    said = run(ReadFile(), {"file": file.format(root=tree)}, roots=[str(tree / "open")])
    place, _, found = said.partition(": ")
    assert found == text and Path(place) == Path(place).resolve() and Path(place).is_relative_to(tree.resolve() / "open")


@pytest.mark.parametrize(
    "file",
    [
        "../secret/key.txt", "deep/../../secret/key.txt", "{root}/secret/key.txt", "{root}/open/../secret/key.txt", "out/key.txt",
        "key", "loop", "new", "..", "../openly.txt", "/etc/passwd", "//etc/passwd", "/proc/self/environ", "/dev/stdin",
        "note.txt\x00/../../secret/key.txt", "out/../secret/key.txt",
    ],
)  # fmt: skip
def test_a_path_outside_never_reaches_the_tool(file: str, tree: Path) -> None:
    """01 E-10: `..`, links, absolute paths, names that only begin alike, devices, zero bytes; an error-valued result."""
    said = run(ReadFile(), {"file": file.format(root=tree)}, roots=[str(tree / "open")])
    assert said.startswith("file: ") and "needle" not in said and ("{root}" in file or str(tree) not in said)
    assert "outside of the folders" in said or "can be followed" in said
    with pytest.raises(NodeExecutionError) as caught:
        graph_of(ReadFile(), {"file": file.format(root=tree)}, roots=[str(tree / "open")]).run({"prompt": ""}, tool_errors="raise")
    assert isinstance(caught.value.__cause__, ToolLimitError)
    assert not (tree / "made").exists()


def test_lists_several_folders_and_folders_that_are_gone(tree: Path) -> None:
    """01 E-10: each item of a list; relative paths count from the first folder; `~` and `$HOME` are names like others."""
    roots = [str(tree / "open"), str(tree / "secret")]
    assert run(ReadFiles(), {"files": ["note.txt", "deep/more.txt", str(tree / "secret/key.txt")]}, roots=roots) == "tideebbneedle"
    for bad in (["note.txt", "../openly.txt"], ["deep"], ["none.txt"], ["~/x"], ["$HOME"]):
        assert run(ReadFiles(), {"files": bad}, roots=roots).startswith("files: ")
    assert "bad arguments" in run(ReadFiles(), {"files": "note.txt"}, roots=roots)
    assert "is not there" in run(ReadFile(), {"file": "note.txt"}, roots=[str(tree / "gone")])


@pytest.fixture(scope="module")
def pages() -> Iterator[int]:
    """A server of pages on this machine."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"high tide at six")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_of_an_allowed_host_is_reached(pages: int) -> None:
    """01 E-10: a real page; the URL is given on as it was read."""
    said = run(Fetch(), {"url": f"HTTP://LOCALHOST:{pages}/tides?day=1"}, hosts=[f"localhost:{pages}"])
    assert said == f"http://localhost:{pages}/tides?day=1: high tide at six"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/", "http://localhost/", "http://localhost:1/", "http://localhost.evil.test:{port}/",
        "http://evil.test@localhost:{port}/", "http://localhost:{port}@evil.test/", "http://evil.test\\@localhost:{port}/",
        "http://evil.test#@localhost:{port}/", "http://evil.test?@localhost:{port}/", "file:///etc/passwd", "ftp://localhost:{port}/",
        "//localhost:{port}/", "localhost:{port}", "http://localhost:{port}/ x", "http://local\thost:{port}/", " http://localhost:{port}/",
        "http://localhost:{port}/\r\nX-Key: 1", "http://ⓛocalhost:{port}/", "http://[::1]:{port}/", "http://[::1/", "http://localhost:99999/", "",
        "http://2130706433:{port}/", "http://sub.localhost:{port}/", "gopher://localhost:{port}/", "http:localhost:{port}/",
    ],
)  # fmt: skip
def test_a_url_of_another_host_is_never_asked_for(url: str, pages: int) -> None:
    """01 E-10, 04 X-40: other hosts and ports, users, backslashes, controls, other schemes, look-alikes."""
    said = run(Fetch(), {"url": url.format(port=pages)}, hosts=[f"localhost:{pages}"])
    assert said.startswith("url: ") and "high tide" not in said


@pytest.mark.parametrize(
    ("hosts", "url", "good"),
    [
        (["a.test"], "https://a.test/x", True), (["a.test"], "http://a.test:80/x", True), (["a.test"], "https://a.test:80/x", False),
        (["a.test"], "https://A.test./x", True), (["a.test"], "https://b.a.test/", False), (["*.a.test"], "https://b.a.test/", True),
        (["*.a.test"], "https://a.test/", False), (["*.a.test"], "https://ba.test/", False), (["*.a.test:8443"], "https://b.a.test:8443", True),
        (["[::1]:8080"], "http://[::1]:8080/", True), (["[::1]"], "http://[::1]/", True), ([], "https://a.test/", False),
    ],
)  # fmt: skip
def test_hosts_and_their_ports(hosts: list[str], url: str, good: bool) -> None:
    """01 E-10: a name alone means the port of the scheme, `*.` all below it."""

    class Show(Fetch):
        def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"page": "reached"}

    graph = graph_of(Show(), {"url": url}, hosts=hosts or ["other.test"])
    assert (graph.run({"prompt": ""})["response"] == "reached") is good


def test_limits_are_part_of_the_graph_and_its_file(tree: Path) -> None:
    """01 T-26, 02 G-51: stored with the tool, also of a graph as a tool, and held to after loading."""
    registry = BlockRegistry()
    for name in ("agent/scripted", "graph/ref"):
        registry.register(name, default_registry().get(name))
    registry.register("test/read_file", ReadFile)
    inner = {"id": "inner", "nodes": [{"node_id": "read", "block_type": "test/read_file"}]}
    inner |= {
        "exposed_inputs": [{"name": "file", "node_id": "read", "port_name": "file"}],
        "exposed_outputs": [{"name": "text", "node_id": "read", "port_name": "text"}],
    }
    roots = [os.fspath(tree / "open")]
    for part in ({"block_type": "test/read_file"}, {"block_type": "graph/ref", "config": {"graph": inner}}):
        script = [{"tool_calls": [{"tool_id": "t", "arguments": {"file": f}} for f in ("note.txt", "../openly.txt")]}, "{results}"]
        config = {
            "id": "g",
            "nodes": [{"node_id": "bot", "block_type": "agent/scripted", "config": {"script": script}}, {"node_id": "tool", **part}],
            "tools": {"t": {"node": "tool", "roots": roots}},
            "exposed_outputs": [{"name": "response", "node_id": "bot", "port_name": "response"}],
            "exposed_inputs": [{"name": "prompt", "node_id": "bot", "port_name": "context"}],
        }
        graph = Graph.from_config(config, registry=registry)
        assert graph.to_config()["tools"] == config["tools"]
        said = graph.run({"prompt": "go"})["response"]
        assert "tide" in said and "outside of the folders" in said and "needle" not in said
        with pytest.raises(ConfigError, match="takes a path; say with roots what it may reach"):
            Graph.from_config({**config, "tools": {"t": "tool"}}, registry=registry)


def test_limits_that_do_not_hold_are_refused() -> None:
    """02 G-26 AGENT_TOOLS: a path without roots, roots without a path, formats where no check comes; nothing is let through."""
    open_graph = graph_of(ReadFile(), {"file": "/etc/passwd"})
    with pytest.raises(ValidationError, match="takes a path; say with roots"):
        open_graph.validate()
    (tool,) = open_graph.agents()["bot"]
    with pytest.raises(ToolLimitError, match="outside"):
        tool.reach.confined({"file": "/etc/passwd"})  # type: ignore[union-attr]
    for arguments, limits, said in (
        ({"file": "x"}, {"roots": ["."], "hosts": ["a.test"]}, "hosts of tool 't' limit nothing"),
        ({"url": "x"}, {"hosts": ["a.test"], "roots": ["."]}, "roots of tool 't' limit nothing"),
    ):
        block = ReadFile() if "file" in arguments else Fetch()
        with pytest.raises(ValidationError, match=said):
            graph_of(block, arguments, **limits).validate()
    for host in ("http://a.test", "a.test/x", "A.test", "", "a b", "*", "user@a.test"):
        with pytest.raises(ToolError, match="no host"):
            graph_of(Fetch(), {"url": "x"}, hosts=[host])

    class Deep(Block):
        """Takes paths where nobody looks."""

        ports = (
            Port("job", "in", "dict", schema={"type": "object", "properties": {"file": {"type": "string", "format": "path"}}}),
            Port("text", "out", "text"),
        )

    with pytest.raises(ToolLimitError, match="deeper its format cannot be held to"):
        graph_of(Deep(), {}).agents()
    loose = {"type": "object", "properties": {"file": {"type": "string"}}, "additionalProperties": False}
    (tool,) = graph_of(ReadFile(), {}, parameters=loose, roots=["."]).agents()["bot"]
    assert tool.reach is not None and list(tool.reach.places) == ["file"], "the block's own word on a path stays"

"""What goes wrong between two machines: a named error each time, and nothing lost."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from far import Far, build, far_registry, one, stop
from test_parity import serve_stage, stage_entry, world_file

from wg_blocks.remote import address
from wg_core import ConfigError, World
from wg_core.assembly.models import EndpointEntry
from wg_core.errors import (
    AbortRun,
    MissingCredentialError,
    NodeExecutionError,
    PortValueError,
    RemoteError,
    RunTimeoutError,
)
from wg_core.levels.remote import Remote
from wg_core.state.store import SnapshotStore


def lone(entry: dict[str, Any], id: str = "p") -> Any:
    """A pipeline of one remote node."""
    return build({"kind": "pipeline", "id": id, "nodes": [{"node_id": "far", **entry}]})


def soon(what: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it comes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if what():
            return True
        time.sleep(0.02)
    return False


def words(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def request_on(connection: socket.socket) -> bytes:
    """All of a request, its body too."""
    data = b""
    with suppress(TimeoutError):
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536) or b"\r\n\r\n"
        head, _, body = data.partition(b"\r\n\r\n")
        size = next((int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
        while len(body) < size:
            piece = connection.recv(65536)
            body += piece or b" " * size
        data = head + b"\r\n\r\n" + body
    return data


@contextmanager
def answering(*replies: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A listener that answers each connection with the next of these bytes, and what it was sent."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work() -> None:
            for reply in replies:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(0.5)
                    seen.append(request_on(connection))
                    connection.sendall(reply)
                    connection.shutdown(socket.SHUT_WR)
                    with suppress(TimeoutError):
                        while connection.recv(65536):
                            pass

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        finally:
            for _ in replies:  # let a listener that still waits come to its end
                if thread.is_alive():
                    with socket.socket() as last:
                        last.connect_ex(listener.getsockname())
            thread.join(5)


CONTRACT = {"inputs": [{"key": "x", "types": "number"}], "outputs": [{"key": "y", "types": "number"}]}


def remote(url: str, **endpoint: Any) -> Remote:
    settings = {"url": url, "backoff_s": 0.01, "timeout_s": 5, **endpoint}
    return Remote("far", endpoint=settings, contract=CONTRACT, registry=far_registry())


def http(status: str, body: bytes, *headers: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""])
    return head.encode() + body


# ---- a server that goes away -------------------------------------------------------------------------------------------


def test_a_server_killed_in_a_run_is_named(tmp_path: Path) -> None:
    """proves 02 M-5: node path, host and the way out; nothing of it hangs."""
    log = tmp_path / "log"
    with Far(one("far/slow", seconds=30, log=str(log))) as far:
        level = lone(far.entry(retries=1))
        threading.Thread(target=lambda: soon(lambda: words(log) == ["begin"]) and far.kill()).start()
        with pytest.raises(RemoteError) as caught:
            level.run({"x": 1})
    message = str(caught.value)
    assert message.startswith(f"p/far at {far.url[7:]}: cannot be reached or broke off")
    assert "start it (wg serve)" in message and caught.value.code == "unreachable"
    assert isinstance(caught.value, NodeExecutionError)


def test_a_world_goes_on_after_a_killed_server(tmp_path: Path) -> None:
    """proves 03 W-19, C-10: the step fails by name, the history stands, and the same step is made once a server is back."""
    served = world_file(tmp_path)
    process, url = serve_stage(served, "creator")
    os.environ["CREATOR_URL"] = url
    try:
        (tmp_path / "mixed").mkdir()
        entry = stage_entry(served, "creator", url)
        entry["endpoint"] = {"url_env": "CREATOR_URL", "retries": 1, "backoff_s": 0.01}
        world = World.from_yaml(world_file(tmp_path / "mixed", creator=entry))
        world.store = SnapshotStore(tmp_path / "store")
        first = world.step()

        def kill_at_creator(event: Any) -> None:
            if event.kind == "stage_start" and event.node_id == "creator":
                stop(process, signal.SIGKILL)

        with pytest.raises(RemoteError, match=rf"isle/creator at {url[7:]}: cannot be reached"):
            world.step(hooks=[kill_at_creator])
        assert [s.id for s in world.history()] == [first.id]
        process, os.environ["CREATOR_URL"] = serve_stage(served, "creator")
        resumed: list[str] = []
        second = world.step(hooks=[lambda e: resumed.append(e.node_id) if e.data.get("resumed") else None])
        assert resumed == ["philosopher", "author", "world_update", "development", "architect"]
        alone = World.from_yaml(served)
        alone.store = SnapshotStore(tmp_path / "alone")
        assert [alone.step().id, alone.step().id] == [first.id, second.id]
        assert list(world.store.verify("isle")) == []
    finally:
        stop(process)
        del os.environ["CREATOR_URL"]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RemoteError, match=rf"far at 127.0.0.1:{port}: cannot be reached .*ConnectError.*tried 3 times"):
        remote(f"http://127.0.0.1:{port}").run({"x": 1})


# ---- a server that is unwell -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hide", [True, False], ids=["after the work", "before the work"])
def test_a_503_is_tried_again_and_computed_once(tmp_path: Path, hide: bool) -> None:
    """proves 02 M-5: the second try has the same request id, so a server that did the work answers without doing it again."""
    log = tmp_path / "log"
    with Far(one("far/slow", seconds=0.05, log=str(log)), unwell={"times": 1, "hide": hide}) as far:
        assert lone(far.entry()).run({"x": 3}) == {"y": 6}
        assert words(log) == ["begin", "end"]


def test_tries_are_bounded() -> None:
    with Far(one("far/affine"), unwell={"times": 99, "hide": False}) as far:
        with pytest.raises(RemoteError, match=r"it answers 503") as caught:
            lone(far.entry(retries=2)).run({"x": 3})
        assert caught.value.status == 503
        with answering(*[http("502 Bad Gateway", b"no")] * 3) as (url, seen):
            with pytest.raises(RemoteError, match=r"it answers 502"):
                remote(url, retries=2).run({"x": 1})
            assert len(seen) == 3
        with answering(http("500 Internal Server Error", b"no")) as (url, seen):
            with pytest.raises(RemoteError, match="it answers 500"):
                remote(url, retries=2).run({"x": 1})
            assert len(seen) == 1


def test_a_slow_server_is_given_up_and_told(tmp_path: Path) -> None:
    """proves 02 M-5: the endpoint's timeout ends the call here, and the run over there."""
    log = tmp_path / "log"
    with Far(one("far/slow", seconds=4, log=str(log))) as far:
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"p/far at .*: no answer within 0\.5 s; raise timeout_s") as caught:
            lone(far.entry(timeout_s=0.5)).run({"x": 1})
        assert time.monotonic() - began < 3.5 and caught.value.code == "timeout"
        with pytest.raises(RunTimeoutError, match=r"took longer than its timeout of 0\.3 s"):
            lone(far.entry()).run({"x": 1}, timeout=0.3)
        assert words(log) == ["begin", "begin"]


def test_a_cancelled_run_is_cancelled_there_too(tmp_path: Path) -> None:
    """proves 02 M-5: cancelling is forwarded."""
    log = tmp_path / "log"
    cancel = threading.Event()
    with Far(one("far/slow", seconds=20, log=str(log)), limits={"concurrency": 1, "waiting": 0}) as far:
        level = lone(far.entry(retries=0))
        threading.Thread(target=lambda: soon(lambda: bool(words(log))) and cancel.set()).start()
        with pytest.raises(AbortRun, match="the run was cancelled"):
            level.run({"x": 1}, cancel=cancel)
        assert words(log) == ["begin"]


@pytest.mark.slow
def test_a_run_that_nobody_waits_for_is_stopped(tmp_path: Path) -> None:
    """A caller that is gone, and does not come back within the grace, frees the server."""
    log = tmp_path / "log"
    with Far(one("far/slow", seconds=60, log=str(log)), limits={"concurrency": 1, "waiting": 0}) as far:
        host, port = far.url[7:].split(":")
        body = b'{"inputs":{"x":1}}'
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(
                f"POST /run HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            assert soon(lambda: bool(words(log)))
        patient = lone(far.entry(retries=6, backoff_s=0.5, timeout_s=30))
        cancel = threading.Event()
        threading.Thread(target=lambda: soon(lambda: len(words(log)) == 2) and cancel.set()).start()
        with pytest.raises(AbortRun):
            patient.run({"x": 1}, cancel=cancel)
        assert words(log) == ["begin", "begin"]


def test_a_failure_there_is_the_failure_here() -> None:
    """The path is that of a local run, with the reason."""
    with Far(one("far/fails", "broken")) as far, pytest.raises(RemoteError) as caught:
        lone(far.entry()).run({"x": 1})
    assert "p/far at 127.0.0.1" in str(caught.value)
    assert "p/far/n failed: RuntimeError: the wheel is off" in str(caught.value)


# ---- what a stranger answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (http("302 Found", b"", "Location: http://127.0.0.1:1/"), "it answers 302, a redirect, which is not followed"),
        (http("200 OK", b"<html>", "Content-Type: text/html"), "its answer is not readable"),
        (http("200 OK", b'{"outputs": NaN}', "Content-Type: application/json"), "its answer is not readable"),
        (http("200 OK", b'{"outputs": {"y": {"$wg": "spell"}}}', "Content-Type: application/json"), "its answer is not readable"),
        (http("200 OK", b'{"usage": {}}', "Content-Type: application/json"), "its answer is not readable"),
        (http("200 OK", b"[" * 4000, "Content-Type: application/json"), "its answer is not readable"),
        (http("200 OK", b"x" * 5000, "Content-Type: application/json"), "larger than max_bytes, 4096"),
        (http("418 I'm a teapot", b"tea"), "it answers 418 http: tea"),
        (b"nonsense\r\n\r\n", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "broke off"),
    ],
)  # fmt: skip
def test_answers_that_are_none(reply: bytes, message: str) -> None:
    with answering(reply) as (url, _), pytest.raises(RemoteError, match=message):
        remote(url, retries=0, max_bytes=4096).run({"x": 1})


def test_undeclared_outputs_are_refused() -> None:
    from wg_core.errors import OutputContractError

    reply = http("200 OK", b'{"outputs": {"z": 1}}', "Content-Type: application/json")
    message = r"far: its output lacks 'y' and has undeclared 'z'"
    with answering(reply) as (url, _), pytest.raises(OutputContractError, match=message):
        remote(url).run({"x": 1})


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"{}", "its /spec is not readable"), (b'{"protocol": 2}', "speaks protocol 2; version 1 is needed")],
)
def test_a_spec_that_is_none(body: bytes, message: str) -> None:
    with (
        answering(http("200 OK", body, "Content-Type: application/json")) as (url, _),
        pytest.raises(RemoteError, match=message),
    ):
        remote(url).fetch_contract()


def test_a_request_that_is_too_large_is_not_sent() -> None:
    contract = {"inputs": [{"key": "x", "types": "bytes"}], "outputs": []}
    level = Remote(
        "far", endpoint={"url": "http://127.0.0.1:9", "max_bytes": 2048}, contract=contract, registry=far_registry()
    )
    with pytest.raises(RemoteError, match=r"the request has .* bytes; the limit is 2048"):
        level.run({"x": bytes(9000)})


def test_what_cannot_travel_is_named_with_its_path() -> None:
    contract = {"inputs": [{"key": "x", "types": "any"}], "outputs": []}
    level = Remote("far", endpoint="http://127.0.0.1:9", contract=contract, registry=far_registry())
    with pytest.raises(PortValueError, match=r"far\.x\.a: set cannot travel"):
        level.run({"x": {"a": {1}}})


def test_only_options_with_a_meaning_elsewhere_travel() -> None:
    """proves 02 M-6; the trace context goes along as a header too, proxies of the environment are not asked."""
    good = http("200 OK", b'{"outputs": {"y": 1}}', "Content-Type: application/json")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    os.environ["HTTP_PROXY"] = os.environ["ALL_PROXY"] = "http://127.0.0.1:9"
    try:
        with answering(good) as (url, seen):
            options = {
                "device": "cpu",
                "callbacks": [lambda e: None],
                "seed": 3,
                "extra": {"step": 1},
                "trace_context": trace,
            }
            assert remote(url).run({"x": 1}, training=True, **options) == {"y": 1}
    finally:
        del os.environ["HTTP_PROXY"], os.environ["ALL_PROXY"]
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert f"traceparent: {trace}".encode() in head
    import json

    sent = json.loads(body)["options"]
    assert sent.keys() == {"timeout_s", "seed", "extra", "trace_context"} and sent["seed"] == 3


# ---- tokens and addresses ------------------------------------------------------------------------------------------------


def test_tokens_come_from_the_environment() -> None:
    os.environ["FAR_TOKEN"] = "open-sesame"
    try:
        with Far(one("far/affine"), token_env="FAR_TOKEN") as far:
            assert lone(far.entry(token_env="FAR_TOKEN")).run({"x": 3}) == {"y": 3}
            with pytest.raises(RemoteError, match=r"401 unauthorized.*token_env") as caught:
                lone(far.entry()).run({"x": 3})
            assert caught.value.code == "unauthorized"
            os.environ["FAR_TOKEN"] = "wrong-word"
            with pytest.raises(RemoteError, match=r"401 unauthorized.*set FAR_TOKEN") as caught:
                lone(far.entry(token_env="FAR_TOKEN")).run({"x": 3})
            assert "wrong-word" not in str(caught.value)
            assert "wrong-word" not in str(lone(far.entry(token_env="FAR_TOKEN")).to_config())
        os.environ["FAR_TOKEN"] = ""
        with pytest.raises(MissingCredentialError, match="FAR_TOKEN"):
            remote("http://127.0.0.1:9", token_env="FAR_TOKEN").run({"x": 1})
    finally:
        del os.environ["FAR_TOKEN"]


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({"url": "ftp://a"}, "http://host:port"), ({"url": "file:///etc/passwd"}, "http://host:port"), ({"url": "a:80"}, "http://host:port"),
        ({"url": "http://u:p@a"}, "no user, password"), ({"url": "http://a/?k=v"}, "no user, password"), ({"url": "http://a:b"}, "malformed"),
        ({"url": "http://a", "allow_hosts": ["b", "c:80"]}, "host a is not among allow_hosts"), ({"url_env": "NO_SUCH_URL"}, "NO_SUCH_URL"),
        ({"url": "http://a", "token_env": "T"}, "in the clear"),
    ],
)  # fmt: skip
def test_addresses_that_are_refused(endpoint: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        address(EndpointEntry(**endpoint), "p/far")
    assert ":p@" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ({"url": "http://localhost:80/x/", "token_env": "T"}, ("http://localhost:80/x", "localhost:80")),
        ({"url": "http://[::1]:80", "token_env": "T"}, ("http://[::1]:80", "::1:80")),
        ({"url": "https://a", "token_env": "T", "allow_hosts": ["a"]}, ("https://a", "a")),
        ({"url": "http://inner:80", "token_env": "T", "allow_hosts": ["inner:80"]}, ("http://inner:80", "inner:80")),
    ],
)  # fmt: skip
def test_addresses_that_are_taken(endpoint: dict[str, Any], expected: tuple[str, str]) -> None:
    assert address(EndpointEntry(**endpoint), "p/far") == expected


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(ConfigError, match="no transport 'grpc' is registered; known: 'http'"):
        remote("http://127.0.0.1:9", transport="grpc").run({"x": 1})

"""The protocol, spoken over real sockets to a real server process."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest
from far import Far, build, one, stop

from wg_blocks.serve import serve
from wg_blocks.wire import INLINE, PARTS_TYPE, Packed, encode
from wg_core.errors import ConfigError, MissingCredentialError

TOKEN = "far-away-and-secret"


@pytest.fixture(scope="module")
def adder() -> Iterator[Far]:
    with Far(one("far/affine", "adder", offset=1), limits={"body": 1_000_000, "answers": 50}) as far:
        yield far


@pytest.fixture(scope="module")
def guarded() -> Iterator[Far]:
    import os

    os.environ["FAR_TOKEN"] = TOKEN
    far = Far(one("far/same", "same"), token_env="FAR_TOKEN")
    yield far
    assert TOKEN not in stop(far.process)
    del os.environ["FAR_TOKEN"]


PATIENCE = 60.0
"""Seconds: a machine under load answers late, which is not what these tests are about."""


def post(far: Far, body: Any = None, **more: Any) -> httpx2.Response:
    if "content" not in more:
        more["json"] = body
    return httpx2.post(f"{far.url}/run", trust_env=False, **{"timeout": PATIENCE, **more})


def get(far: Far, path: str, **more: Any) -> httpx2.Response:
    return httpx2.get(far.url + path, trust_env=False, **{"timeout": PATIENCE, **more})


def test_spec_health_and_run(adder: Far) -> None:
    """proves 02 M-3."""
    assert get(adder, "/health").json() == {"status": "ok", "protocol": 1}
    spec = get(adder, "/spec").json()
    level = build(adder.config)
    assert (spec["id"], spec["protocol"], spec["contract_hash"]) == ("adder", 1, level.contract_hash())
    assert spec["contract"]["inputs"] == [{"key": "x", "types": ["number"]}]
    assert spec["contract"]["config_hash"] == level.config_hash
    answer = post(adder, {"inputs": {"x": 2}, "contract_hash": spec["contract_hash"], "request_id": "request-1"})
    assert (answer.status_code, answer.json()) == (200, {"outputs": {"y": 3}, "usage": {}})


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"inputs": {"x": 1}, "contract_hash": "0" * 64}, 409, "contract_mismatch", "000000000000"),
        ({"inputs": {"x": 1}, "config_hash": "0" * 64}, 409, "config_mismatch", "000000000000"),
        ({"inputs": {"z": 1}}, 422, "bad_inputs", "no input 'z'"),
        ({"inputs": {}}, 422, "bad_inputs", "needs 'x'"),
        ({"inputs": {"x": "one"}}, 422, "bad_inputs", "takes number but got str"),
        ({"inputs": {"x": {"$wg": "tensor", "data": "AAAA"}}}, 422, "bad_inputs", "inputs.x"),
        ({"inputs": {"x": 1}, "options": {"per_node": {"n": {"device": "cuda"}}}}, 422, "bad_inputs", "'device'"),
        ({"inputs": {"x": 1}, "options": {"device": "cuda"}}, 400, "bad_request", "options.device"),
        ({"inputs": {"x": 1}, "request_id": "../../x"}, 400, "bad_request", "request_id"),
        ({"inputs": {"x": 1}, "surprise": 1}, 400, "bad_request", "surprise"),
        ({"inputs": {"x": 1}, "place": [{"level": "graph", "id": "a/b"}]}, 400, "bad_request", "place.0.id"),
        ([], 400, "bad_request", ""),
        ({"inputs": {"x": 1}, "blobs": ["a" * 64]}, 424, "missing_blobs", "1 blobs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(adder: Far, body: Any, status: int, code: str, says: str) -> None:
    answer = post(adder, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "bad_json"), (b'{"inputs": {"x": NaN}}', "application/json", 400, "bad_json"),
        (b"[" * 100_000, "application/json", 400, "bad_json"), (b"{}", "text/plain", 415, "media_type"),
        (b"short", PARTS_TYPE, 400, "bad_json"), (b" " * 1_000_001, "application/json", 413, "too_large"),
    ],
)  # fmt: skip
def test_bodies_that_are_none(adder: Far, content: bytes, kind: str, status: int, code: str) -> None:
    answer = post(adder, content=content, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_of_unknown_length_is_counted(adder: Far) -> None:
    pieces = (b" " * 100_000 for _ in range(11))
    answer = post(adder, content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_paths_and_methods_that_do_not_exist(adder: Far) -> None:
    assert get(adder, "/nothing").status_code == 404
    assert get(adder, "/run").status_code == 405
    assert get(adder, "/blobs/..%2f..%2fetc%2fpasswd").status_code == 404
    assert get(adder, f"/blobs/{'a' * 64}").json()["error"]["code"] == "unknown_blob"


def test_another_host_name_is_refused(adder: Far) -> None:
    """A page in a browser that was made to resolve to this machine gets nothing."""
    answer = get(adder, "/spec", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host")


def test_one_request_id_is_one_answer(tmp_path: Path) -> None:
    """proves 02 M-5: the same id is computed once, while it runs and afterwards; another body under it is refused."""
    log = tmp_path / "log"
    with Far(one("far/slow", seconds=0.3, log=str(log))) as far:
        body = {"inputs": {"x": 4}, "request_id": "the-same-id"}
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: post(far, body).json(), range(8)))
        answers.append(post(far, body).json())
        assert answers == [{"outputs": {"y": 8}, "usage": {}}] * 9
        assert log.read_text().split() == ["begin", "end"]
        assert post(far, {**body, "inputs": {"x": 5}}).json()["error"]["code"] == "request_id_reused"
        post(far, {**body, "request_id": "another-id"})
        assert log.read_text().split() == ["begin", "end"] * 2


def test_old_answers_are_forgotten_and_running_ones_are_not(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Far(one("far/slow", seconds=0.02, log=str(log)), limits={"answers": 2}) as far:
        for name in ("request-a", "request-b", "request-c", "request-c", "request-a"):
            assert post(far, {"inputs": {"x": 1}, "request_id": name}).json()["outputs"] == {"y": 2}
        assert log.read_text().split().count("begin") == 4


def test_failures_are_answers(tmp_path: Path) -> None:
    with Far(one("far/fails", "broken")) as far:
        answer = post(far, {"inputs": {"x": 1}, "place": [{"level": "pipeline", "id": "p", "node": "broken"}]})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["kind"]) == (500, "execution_failed", "NodeExecutionError")
        assert "p/broken/n failed: RuntimeError: the wheel is off" in error["message"]


@pytest.mark.parametrize(
    "header",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer é"}],
)
def test_without_the_token_nothing_is_told(guarded: Far, header: dict[str, str]) -> None:
    raw = {k: v.encode("utf-8") for k, v in header.items()}
    for method, path in (
        ("GET", "/spec"),
        ("POST", "/run"),
        ("GET", f"/blobs/{'a' * 64}"),
        ("PUT", f"/blobs/{'a' * 64}"),
        ("DELETE", "/run/x"),
    ):
        answer = httpx2.request(method, guarded.url + path, headers=raw, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert TOKEN not in answer.text
    assert get(guarded, "/health").status_code == 200


def test_with_the_token(guarded: Far) -> None:
    header = {"Authorization": f"Bearer {TOKEN}"}
    assert post(guarded, {"inputs": {"x": [None, "ü"]}}, headers=header).json()["outputs"] == {"y": [None, "ü"]}
    packed = Packed()
    kind, pieces = packed.body({"inputs": {"x": encode(b"y" * (INLINE + 1), packed)}})
    answer = post(guarded, content=b"".join(pieces), headers={**header, "Content-Type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (200, PARTS_TYPE)


def test_blobs_are_kept_under_their_hash(guarded: Far) -> None:
    header = {"Authorization": f"Bearer {TOKEN}"}
    sha = sha256(b"tide").hexdigest()
    assert get(guarded, f"/blobs/{sha}", headers=header).status_code == 404
    wrong = httpx2.put(f"{guarded.url}/blobs/{sha}", content=b"ebb", headers=header, trust_env=False)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "bad_blob")
    assert httpx2.put(f"{guarded.url}/blobs/{sha}", content=b"tide", headers=header, trust_env=False).status_code == 204
    assert get(guarded, f"/blobs/{sha}", headers=header).content == b"tide"


def test_two_hundred_requests_at_once(adder: Far) -> None:
    with ThreadPoolExecutor(40) as threads, httpx2.Client(trust_env=False, timeout=30) as client:

        def ask(i: int) -> int:
            answer = client.post(f"{adder.url}/run", json={"inputs": {"x": i}, "request_id": f"many-{i:04}"})
            return answer.json()["outputs"]["y"]

        assert list(threads.map(ask, range(200))) == [i + 1 for i in range(200)]


@pytest.mark.slow
def test_runs_are_bounded(tmp_path: Path) -> None:
    """One at a time and one waiting: others are told to come back."""
    config = one("far/slow", seconds=0.5, log=str(tmp_path / "log"))
    with Far(config, limits={"concurrency": 1, "waiting": 1}) as far, ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda i: post(far, {"inputs": {"x": i}}, timeout=20), range(6)))
        assert sorted(a.status_code for a in answers) == [200, 200, 503, 503, 503, 503]
        assert next(a for a in answers if a.status_code == 503).headers["retry-after"] == "1"


def test_stored_blobs_are_bounded() -> None:
    with Far(one("far/same"), limits={"store_bytes": 10}) as far:
        replies = [
            httpx2.put(f"{far.url}/blobs/{sha256(d).hexdigest()}", content=d, trust_env=False).status_code
            for d in (b"12345678", b"abc")
        ]
        assert replies == [204, 507]


def test_a_server_that_others_reach_needs_a_token() -> None:
    level = build(one("far/same"))
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from elsewhere; .*--token-env"):
        serve(level, host="0.0.0.0", port=0)
    with pytest.raises(MissingCredentialError, match="NO_SUCH_TOKEN"):
        serve(level, port=0, token_env="NO_SUCH_TOKEN")


def test_a_taken_port_is_an_error(adder: Far) -> None:
    port = int(adder.url.rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        serve(build(one("far/same")), port=port)
    with socket.create_connection(("127.0.0.1", port)):
        pass


def test_the_token_is_in_no_output(guarded: Far) -> None:
    assert TOKEN not in json.dumps(get(guarded, "/spec", headers={"Authorization": f"Bearer {TOKEN}"}).json())

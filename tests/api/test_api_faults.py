"""What goes wrong at a provider is a named error, in time and without the key; never a result."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from api_server import KEY, ApiServer, chat, picture, serving, status
from PIL import Image

from wg_blocks.api import Endpoint, close_clients
from wg_blocks.api.client import Client, Limits
from wg_blocks.api.fake import Fake
from wg_blocks.maps import to_png
from wg_core import Block, Graph
from wg_core.errors import (
    AbortRun,
    ApiRateLimitError,
    ApiResponseError,
    ApiTimeoutError,
    NodeExecutionError,
    RunTimeoutError,
)

BAD_ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "a page": ({"raw": b"<html>Welcome</html>", "headers": {"Content-Type": "text/html"}}, "text/html that is no JSON"),
    "cut": ({"raw": json.dumps(chat("x")["json"]).encode()[:-9]}, "no JSON"),
    "empty": ({"raw": b""}, "no JSON"),
    "no text at all": ({"raw": b"\xff\xfe\x00"}, "no JSON"),
    "deep": ({"raw": b"[" * 100_000}, "no JSON"),
    "a list": ({"json": []}, "a JSON list, not an object"),
    "an error": ({"json": {"error": {"message": "overloaded"}}}, "its answer is an error: overloaded"),
    "an error in words": ({"json": {"error": "model is loading"}}, "its answer is an error: model is loading"),
    "an error without words": ({"json": {"error": {"code": 5}}}, r"its answer is an error: \{'code': 5\}"),
    "no choices": ({"json": {"choices": []}}, "no choices"),
    "choices of another kind": ({"json": {"choices": "abc"}}, "no choices"),
    "no message": ({"json": {"choices": [{"finish_reason": "stop"}]}}, "no message"),
    "no content": (chat(None), r"no text \(content NoneType"),
    "a number": (chat(7), r"no text \(content int"),
    "a refusal": (chat(None, refusal="I will not."), "the model refused: I will not"),
    "a filter": (chat("half an ans", "content_filter"), "content filter"),
    "a redirect": ({"status": 307, "json": {}, "headers": {"Location": "http://127.0.0.1:1/"}}, "307, a redirect"),
    "a bad request": (status(400, "Invalid schema for response_format"), "answers 400: Invalid schema.*see structure"),
    "a refused key": (status(401, f"Incorrect API key: {KEY}"), r"refuses the key \(401\); see what WG_TEST_KEY holds"),
    "too long": (status(400, "context_length_exceeded"), "context_length_exceeded"),
    "too large": ({"raw": b" " * 200_000}, r"larger than max_response_bytes \(150000\)"),
    "too large, unannounced": ({"raw": b" " * 200_000, "length": None}, "larger than max_response_bytes"),
    "compressed": ({"raw": b"\x1f\x8b", "headers": {"Content-Encoding": "gzip"}}, "is compressed"),
}


@pytest.mark.parametrize("fault", BAD_ANSWERS)
def test_an_answer_that_is_none(fault: str, api: Callable[..., Block], server: ApiServer) -> None:
    """01 A-2, 03 W-21: ApiResponseError that says what came; asked once; the key is in no message."""
    reply, says = BAD_ANSWERS[fault]
    server.replies.append(reply)
    with pytest.raises(ApiResponseError, match=says) as caught:
        api(max_response_bytes=150_000).run({"prompt": "x"})
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in str(error) + repr(vars(error))
        error = error.__cause__ or error.__context__
    assert len(server.seen) == 1


@pytest.mark.parametrize("reply", [status(500), status(503), status(408), status(409), {"raw": b"{}", "length": 99}])
def test_passing_faults_are_tried_again(reply: dict[str, Any], api: Callable[..., Block], server: ApiServer) -> None:
    """01 E-9, 03 W-21: 5xx, lock, timeout and a broken connection, as often as max_retries says."""
    server.replies.append(reply)
    assert api().run({"prompt": "x"})["text"].startswith("An answer")
    server.replies.extend([reply] * 2)
    with pytest.raises(ApiResponseError, match=r"answers|broke off"):
        api().run({"prompt": "x"})
    assert len(server.seen) == 4


def test_nobody_there(api: Callable[..., Block]) -> None:
    with serving() as gone:
        url = gone.url
    with pytest.raises(ApiResponseError, match=r"provider openai at 127\.0\.0\.1: it cannot be reached"):
        api(endpoint_url=url).run({"prompt": "x"})


def test_rate_limits(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-21: Retry-After is honoured up to what is left of the time; a used-up quota is not asked again."""
    server.replies.append(status(429, Retry_After="0.4"))
    started = time.monotonic()
    api().run({"prompt": "x"})
    assert 0.4 <= time.monotonic() - started < 2 and len(server.seen) == 2
    for wait, timeout in (("30", 5), ("500", 3000), ("Fri, 31 Dec 2999 23:59:59 GMT", 3000)):
        server.replies.append(status(429, "slow down", Retry_After=wait))
        started = time.monotonic()
        with pytest.raises(ApiRateLimitError, match=r"too many requests \(429\); it asks to wait .*slow down"):
            api(timeout_s=timeout).run({"prompt": "x"})
        assert time.monotonic() - started < 2
        close_clients()
    asked = len(server.seen)
    server.replies.append(status(429, "no more", "insufficient_quota"))
    with pytest.raises(ApiRateLimitError, match="quota is used up"):
        api().run({"prompt": "x"})
    assert len(server.seen) == asked + 1


@pytest.mark.parametrize("reply", [{"hang": True}, {**chat("x" * 500), "drip": 10}])
def test_the_deadline_is_for_the_whole_answer(
    reply: dict[str, Any], api: Callable[..., Block], server: ApiServer
) -> None:
    """01 F-30: also for a server that sends a little all the time."""
    server.replies.append(reply)
    started = time.monotonic()
    with pytest.raises(ApiTimeoutError, match=r"openai/tale-1: no whole answer within 0.5 s"):
        api(timeout_s=0.5).run({"prompt": "x"})
    assert time.monotonic() - started < 1.5


def test_a_run_that_stops_ends_its_request(api: Callable[..., Block], server: ApiServer) -> None:
    """02 G-36: cancelling and the run's own timeout reach a call that hangs."""
    graph, cancel = Graph("g"), threading.Event()
    graph.add_node(api(), "llm")
    graph.expose_input("llm", "prompt", name="prompt")
    for options, error in (({"cancel": cancel}, AbortRun), ({"timeout": 0.3}, RunTimeoutError)):
        server.replies.append({"hang": True})
        threading.Timer(0.3, cancel.set).start()
        started = time.monotonic()
        with pytest.raises((error, NodeExecutionError)) as caught:
            graph.run({"prompt": "x"}, **options)
        assert isinstance(caught.value, error) or isinstance(caught.value.__cause__, error)
        assert time.monotonic() - started < 2


def test_at_most_so_many_at_once(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-35: all blocks of one endpoint together."""
    server.pause = 0.05
    blocks = [api(model_id=f"m{i}", max_concurrent_requests=2) for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda b: b.run({"prompt": "x"})["text"], blocks))
    assert len(texts) == len(server.seen) == 8 and server.most_at_once == 2


def test_when_one_is_asked_to_wait_all_do(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-35: backoff belongs to the endpoint."""
    server.replies.append(status(429, Retry_After="0.5"))
    started = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(api(model_id="a").run, {"prompt": "x"})
        time.sleep(0.2)
        threads.submit(api(model_id="b").run, {"prompt": "x"}).result()
        assert time.monotonic() - started >= 0.5
        first.result()


def test_a_waiting_call_that_is_cancelled_frees_its_place() -> None:
    """01 F-35."""
    client, limits = Client(Fake(Endpoint("fake"))), Limits(0.2, 0, 1, 1024)

    async def never(provider: Any) -> None:
        await __import__("asyncio").sleep(60)

    for _ in range(3):
        with pytest.raises(ApiTimeoutError):
            client.call("fake/m", never, limits)


def png(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("1", size).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (picture(b"not a picture"), "13 bytes are no readable picture"),
        (picture(to_png(np.zeros((64, 64, 3), np.uint8))[:-40]), "no readable picture"),
        (picture(png((5000, 5000))), "5000x5000 pixels is more than"),
        (picture(png((20_000, 10_000))), "no readable picture"),
        (picture(to_png(np.zeros((9, 9, 3), np.uint8))), "9x9 came where 12x8 was asked for"),
        ({"json": {"data": [{"b64_json": "%%%"}]}}, "no base64"),
        ({"json": {"data": [{"url": "http://127.0.0.1:1/x.png"}]}}, "a picture behind a URL is not fetched"),
        ({"json": {"data": []}}, "no data"),
    ],
)
def test_pictures_that_are_none(reply: dict[str, Any], says: str, api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-20, A-2: no bytes, cut bytes, bombs, another size; nothing is fetched from elsewhere."""
    server.replies.append(reply)
    with pytest.raises(ApiResponseError, match=says):
        api("generator/api", size="12x8").run({"prompt": "x"})
    assert len(server.seen) == 1


def rows(*vectors: Any) -> dict[str, Any]:
    return {"raw": json.dumps({"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)]}).encode()}


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (rows([1.0, float("nan")], [1.0, 2.0]), "NaN is no JSON number"),
        (rows([1.0, 1e999], [1.0, 2.0]), "Infinity is no JSON number"),
        ({"raw": b'{"data": [{"embedding": [1e999, 1]}, {"embedding": [1, 1]}]}'}, "list of finite numbers"),
        (rows([1.0, 2.0], [1.0]), "has 1 numbers where 2 are due"),
        (rows([1.0, 2.0]), "1 vectors for 2 texts"),
        (rows([], []), "list of finite numbers"),
        (rows("AAAA", "AAAA"), "list of finite numbers"),
        (rows([True, 1.0], [1.0, 2.0]), "list of finite numbers"),
        (
            {"json": {"data": [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}]}},
            "2 vectors for 2 texts",
        ),
    ],
)
def test_vectors_that_are_none(reply: dict[str, Any], says: str, api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-16, A-2."""
    server.replies.append(reply)
    with pytest.raises(ApiResponseError, match=says):
        api("embedding/api").run({"input": ["a", "b"]})


def test_vectors_of_another_size_than_before_or_than_asked(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-16."""
    block = api("embedding/api")
    block.run({"input": "a"})
    server.replies.append(rows([1.0, 2.0]))
    with pytest.raises(ApiResponseError, match="has 2 numbers where 3 are due"):
        block.run({"input": "a"})
    with pytest.raises(ApiResponseError, match="has 3 numbers where 8 are due"):
        api("embedding/api", dimensions=8).run({"input": "a"})


def test_the_key_is_nowhere(api: Callable[..., Block], server: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    """01 F-33, T-25, A-7: not in logs at their loudest, errors, events, config or repr, though the server says it back."""
    caplog.set_level(logging.DEBUG)
    told: list[Any] = []
    graph = Graph("g")
    graph.add_node("llm/api", "llm", config=api().to_config()["config"])
    graph.expose_input("llm", "prompt", name="prompt")
    server.replies.extend([status(500, KEY), chat(f"Your key is {KEY}."), status(400, KEY), status(403, KEY)])
    told.append(graph.run({"prompt": "x"}, callbacks=[told.append]))
    for _ in range(2):
        with pytest.raises(NodeExecutionError) as caught:
            graph.run({"prompt": "x"}, callbacks=[told.append])
        told += [str(caught.value), repr(caught.value.__cause__)]
    block = graph.nodes["llm"].child
    told += [graph.to_config(), repr(block), vars(block), block.state_dict(), caplog.text]
    assert server.seen[0][1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(told) and base64.b64encode(KEY.encode()).decode() not in repr(told)
    assert "[key]" in repr(told)

"""Texts that come in pieces: through the engine's stream driver, held back by the reader, ended with the run."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from types import AsyncGeneratorType
from typing import Any

import numpy as np
import pytest
from api_server import KEY, ApiServer, chat, deltas, events, status

from wg_core import Block, Graph
from wg_core.errors import AbortRun, ApiResponseError, ApiTimeoutError, NodeExecutionError
from wg_core.execution.calls import CallLog


def graph_of(block: Block) -> Graph:
    graph = Graph("g")
    graph.add_node(block, "llm")
    for name in ("prompt", "schema", "params", "image"):
        if name in block.port_index.inputs:
            graph.expose_input("llm", name, name=name)
    graph.expose_output("llm", "text", name="text")
    graph.expose_output("llm", "usage", name="usage")
    return graph


def read(graph: Graph, inputs: dict[str, Any], **options: Any) -> tuple[list[str], dict[str, Any]]:
    """The pieces of a run and its result."""
    *pieces, last = graph.stream(inputs, **options)
    assert last.final
    return [p.outputs["text"] for p in pieces if "text" in p.outputs], last.outputs


def test_pieces_add_up_to_the_result(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-30, T-14, 02 G-40: pieces as they come, then the text with its usage; the same record as without a stream."""
    server.replies.extend([events(*deltas("It rained in the harbour.")), chat("It rained in the harbour.")])
    log, plain = CallLog(), CallLog()
    pieces, out = read(graph_of(api(prices={"prompt": 1.0})), {"prompt": "x"}, calls=log, seed=3)
    assert pieces == ["It", " rained", " in", " the", " harbour."] and out["text"] == "".join(pieces)
    assert (out["usage"]["prompt_tokens"], out["usage"]["completion_tokens"]) == (11, 7)
    body = server.seen[0][2]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    graph_of(api()).run({"prompt": "x"}, calls=plain, seed=3)
    assert log.calls == plain.calls and "stream" not in server.seen[1][2]
    assert read(graph_of(api()), {"prompt": "x"}, calls=CallLog(log.calls), seed=3)[1]["text"] == out["text"]
    assert len(server.seen) == 2


def test_a_picture_is_told_of_in_pieces(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-15."""
    server.replies.append(events(*deltas("A grey square.")))
    pieces, out = read(graph_of(api("vlm/api")), {"image": np.zeros((1, 3, 4, 5))})
    assert pieces == ["A", " grey", " square."] and out["text"] == "A grey square."


def test_what_may_be_asked_again_is_not_streamed(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-22: a structure is checked before anyone sees it; a batch has no one text."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for inputs in ({"prompt": "x", "schema": schema}, {"prompt": ["a", "b"]}):
        pieces, out = read(graph_of(api()), inputs)
        assert pieces == [] and out["text"]
    assert not any("stream" in body for _, _, body in server.seen)


BAD_STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    "no end": (events(*deltas("half an", None)), "ended without a finish_reason, so the answer is not whole"),
    "nothing": (events(done=False), "ended without a finish_reason"),
    "done at once": (events(), "ended without a finish_reason"),
    "a page": ({"raw": b"<html>Hi</html>", "headers": {"Content-Type": "text/html"}}, "text/html that is no event stream"),
    "a whole answer": (chat("not streamed"), "application/json that is no event stream"),
    "cut JSON": (events('{"choices": [{"del'), "an event of its stream is no JSON"),
    "a list": (events([1]), "an event of its stream is a JSON list"),
    "no delta": (events({"choices": [{"finish_reason": "stop"}]}), "no delta"),
    "an error": (events(*deltas("half", None), {"error": {"message": "the model crashed"}}), "error: the model crashed"),
    "a filter": (events(*deltas("half", "content_filter")), "content filter"),
    "a refusal": (events(*deltas("", "stop", {"refusal": "I will"}, {"refusal": " not."})), "the model refused: I will not."),
    "nothing said": (events(*deltas("")), "the model wrote nothing"),
    "too large": (events(*deltas("word " * 20_000)), "larger than max_response_bytes"),
    "broken off": ({**events(*deltas("half", None), done=False), "length": 99_999}, "broke off"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_STREAMS)
def test_a_stream_that_is_no_answer(fault: str, api: Callable[..., Block], server: ApiServer) -> None:
    """01 A-2, 03 W-21: an error, never a result; what was told already is not asked for again."""
    reply, says = BAD_STREAMS[fault]
    server.replies.append(reply)
    with pytest.raises(NodeExecutionError, match=says) as caught:
        read(graph_of(api(max_response_bytes=100_000)), {"prompt": "x"})
    assert isinstance(caught.value.__cause__, ApiResponseError) and len(server.seen) == 1


def test_a_failed_stream_is_closed_where_it_was_read(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-21: nothing half-read is left to the garbage collector, which would close it from another thread."""
    gc.collect()
    gc.disable()
    try:
        for reply, says in BAD_STREAMS.values():
            server.replies.append(reply)
            with pytest.raises(NodeExecutionError, match=says):
                read(graph_of(api(max_response_bytes=100_000)), {"prompt": "x"})
        until = time.monotonic() + 5
        while left := [o for o in gc.get_objects() if type(o) is AsyncGeneratorType]:
            assert time.monotonic() < until, left
    finally:
        gc.enable()


def test_what_fails_before_the_first_piece_is_tried_again(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-21."""
    server.replies.extend([status(503), events(*deltas("It rains."))])
    assert read(graph_of(api()), {"prompt": "x"})[0] == ["It", " rains."] and len(server.seen) == 2


def flowing(count: int, words: int = 20) -> Iterator[bytes]:
    for _ in range(count):
        yield events(*deltas("word " * words, None)[:-1], done=False)["raw"]


def test_a_run_that_is_cancelled_or_left_ends_its_request(api: Callable[..., Block], server: ApiServer) -> None:
    """02 G-36, G-40: within a second, whether the reader waits for a piece or goes away."""
    server.replies.extend([{"flow": flowing(100_000)}] * 2)
    cancel = threading.Event()
    chunks = graph_of(api()).stream({"prompt": "x"}, cancel=cancel)
    next(chunks)
    cancel.set()
    started = time.monotonic()
    with pytest.raises(AbortRun):
        list(chunks)
    assert server.left.wait(1) and time.monotonic() - started < 1
    server.left.clear()
    chunks = graph_of(api()).stream({"prompt": "x"})
    next(chunks)
    chunks.close()
    assert server.left.wait(1)


def test_a_slow_reader_holds_the_server_back_and_not_the_deadline(api: Callable[..., Block], server: ApiServer) -> None:
    """02 G-40: pieces are not heaped up here; the deadline is for the server."""
    server.replies.append({"flow": list(flowing(1, 10_000)) * 200})
    chunks = graph_of(api(timeout_s=30, max_response_bytes=1 << 30)).stream({"prompt": "x"})
    next(chunks)
    time.sleep(0.5)
    early = server.written
    time.sleep(0.5)
    assert server.written - early <= 1 and early < 50
    chunks.close()
    server.replies.append({"flow": [events(*deltas("One two three four five six seven eight"))["raw"]]})
    chunks = graph_of(api(timeout_s=2)).stream({"prompt": "x"})
    next(chunks)
    time.sleep(2.5)
    assert list(chunks)[-1].outputs["text"].endswith("eight")


def test_a_stream_has_a_deadline(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-30."""
    server.replies.append({**events(*deltas("a " * 2000)), "drip": 40})
    with pytest.raises(NodeExecutionError, match=r"no whole answer within 0\.6 s") as caught:
        read(graph_of(api(timeout_s=0.6)), {"prompt": "x"})
    assert isinstance(caught.value.__cause__, ApiTimeoutError)


def test_the_key_is_in_no_piece(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-33, A-7: also where the server sends it back in parts."""
    said = [{"choices": [{"delta": {"content": p}}]} for p in ("Key ", KEY[:7], KEY[7:], " and ", KEY[:5])]
    server.replies.append(events(*said, {"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    pieces, out = read(graph_of(api()), {"prompt": "x"})
    assert "".join(pieces) == out["text"] == f"Key [key] and {KEY[:5]}"
    assert not any(KEY[:7] in piece for piece in pieces)


def test_one_answer_is_read_where_several_come(api: Callable[..., Block], server: ApiServer) -> None:
    """01 T-14: with `n` in extra_body the answers of a stream come mixed; the first one counts, as without a stream."""
    mixed = [
        {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": end}]}
        for index, text, end in ((0, "It ", None), (1, "Elsewhere ", None), (0, "rained.", "stop"), (1, "it snowed.", "stop"))
    ]
    server.replies.append(events(*mixed))
    assert read(graph_of(api(extra_body={"n": 2})), {"prompt": "x"})[1]["text"] == "It rained."


def test_an_error_in_a_stream_says_what_the_server_said(api: Callable[..., Block], server: ApiServer) -> None:
    """01 F-35."""
    server.replies.append(events(*deltas("It rained.")[:2], {"error": "the model was unloaded"}))
    with pytest.raises(NodeExecutionError, match="its stream ended in an error: the model was unloaded"):
        read(graph_of(api()), {"prompt": "x"})

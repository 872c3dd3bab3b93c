"""Kept answers: by the whole request, asked for once, with no key in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_server import KEY, ApiServer, chat

from wg_blocks.api.cache import FOLDER
from wg_core import Block
from wg_core.errors import ApiResponseError
from wg_core.execution.context import FRAME, Frame, RunOptions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WG_HOME", str(tmp_path))
    return tmp_path / FOLDER


def test_it_is_off_unless_asked_for(api: Callable[..., Block], server: ApiServer, folder: Path) -> None:
    """01 E-9, 03 W-21."""
    for _ in range(2):
        api().run({"prompt": "x"})
    assert len(server.seen) == 2 and not folder.exists()


def test_an_equal_request_is_made_once(api: Callable[..., Block], server: ApiServer, folder: Path) -> None:
    """01 E-9, 03 W-21: all that decides the answer is in the key; a kept answer takes no tokens."""
    first = api(cache=True).run({"prompt": "x", "params": {"seed": 1}})
    again = api(cache=True, timeout_s=5).run({"prompt": "x", "params": {"seed": 1}})
    assert again["text"] == first["text"] and len(server.seen) == 1
    assert first["usage"]["calls"] == 1 and first["usage"]["prompt_tokens"] == 11
    assert again["usage"]["calls"] == again["usage"]["prompt_tokens"] == 0
    tool = {"name": "wait", "parameters": {"type": "object"}}
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"prompt": "y"}), ({}, {"params": {"seed": 2}}), ({}, {"params": {"seed": 1, "temperature": 0.1}}),
        ({}, {"schema": schema}), ({}, {"tools": [tool]}), ({}, {"system": "s"}), ({"model_id": "tale-2"}, {}),
        ({"extra_body": {"n": 1}}, {}), ({"options": {"query": {"v": "1"}}}, {}), ({"endpoint_url": server.url.replace("127.0.0.1", "localhost")}, {}),
    ]  # fmt: skip
    for config, inputs in others:
        asked = len(server.seen)
        api(cache=True, **config).run({"prompt": "x", "params": {"seed": 1}, **inputs})
        assert len(server.seen) == asked + 1, (config, inputs)


def test_all_roles_keep_and_find(api: Callable[..., Block], server: ApiServer, folder: Path) -> None:
    """03 W-21: pictures, vectors, sounds and tool calls come back as they were."""
    called = [{"id": "c", "type": "function", "function": {"name": "wait", "arguments": "{}"}}]
    server.replies.append(chat(None, "tool_calls", tool_calls=called))
    tone = {"waveform": np.zeros((1, 80), np.float32), "sample_rate": 8000}
    tool = {"name": "wait", "parameters": {"type": "object"}}
    for block_type, inputs in (
        ("llm/api", {"prompt": "x", "tools": [tool]}),
        ("generator/api", {"prompt": "a pier", "seed": 1}),
        ("embedding/api", {"input": ["a", "b"]}),
        ("speech/api", {"text": "hello"}),
        ("transcription/api", {"audio": tone}),
        ("vlm/api", {"image": np.zeros((1, 3, 4, 4))}),
    ):
        asked = len(server.seen)
        one, two = (api(block_type, cache=True).run(dict(inputs)) for _ in range(2))
        one.pop("usage", None), two.pop("usage", None)
        assert len(server.seen) == asked + 1 and repr(one) == repr(two), block_type


def test_what_is_no_result_is_not_kept(api: Callable[..., Block], server: ApiServer, folder: Path) -> None:
    """01 A-2: and what is kept but broken is asked for anew."""
    server.replies.append({"raw": b'{"data": [{"embedding": [1e999]}]}'})
    with pytest.raises(ApiResponseError):
        api("embedding/api", cache=True).run({"input": "a"})
    assert not folder.exists()
    api(cache=True).run({"prompt": "x"})
    (kept,) = (p for p in folder.rglob("*") if p.is_file())
    kept.write_bytes(b'{"request": {}')
    api(cache=True).run({"prompt": "x"})
    assert len(server.seen) == 3 and json.loads(kept.read_bytes())["answer"]["text"]


def test_a_kept_answer_holds_no_key_and_costs_no_budget(
    api: Callable[..., Block], server: ApiServer, folder: Path
) -> None:
    """01 F-33, E-9."""
    server.replies.append(chat(f"Your key is {KEY}."))
    block = api(cache=True)
    asked = {"prompt": "x", "params": {"seed": 1}}
    assert block.run(asked)["text"] == "Your key is [key]."
    kept = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    assert kept and not any(KEY.encode() in data for data in kept)
    frame = Frame("graph", "g", RunOptions(budget={"calls": 0}))
    token = FRAME.set(frame)
    try:
        assert block.run(asked)["text"] == "Your key is [key]."
    finally:
        FRAME.reset(token)
    assert frame.usage == {}


@pytest.mark.parametrize("answer", [None, 5, {"text": "x"}, {"text": "x", "ended": True, "tool_calls": [{"x": 1}]}])
def test_what_is_no_answer_is_asked_for_anew(answer: Any, api: Callable[..., Block], server: ApiServer, folder: Path) -> None:
    """03 W-21: a kept file that holds the request, but no answer."""
    said = api(cache=True).run({"prompt": "x", "params": {"seed": 1}})["text"]
    (file,) = folder.glob("*/*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "answer": answer}))
    assert api(cache=True).run({"prompt": "x", "params": {"seed": 1}})["text"] == said and len(server.seen) == 2

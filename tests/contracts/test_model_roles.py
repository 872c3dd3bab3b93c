"""The table of model roles: which types there are, their ports, what they take, the same here and behind an API."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wg_blocks.maps import to_png
from wg_core import Block, Graph, ModelPool
from wg_core.assembly.registry import default_registry
from wg_core.assembly.roles import KNOWN_ROLES, role_issues
from wg_core.errors import ConfigError, PortValueError
from wg_core.execution.blobs import MemoryBlobs

sys.path.insert(0, str(Path(__file__).parent.parent / "api"))
from api_server import ApiServer, chat, serving

from wg_blocks.api import close_clients

FAKE = {"provider": "fake", "model_id": "m"}
VLM = {"block_type": "vlm/api", "config": FAKE}
LLMS: dict[str, dict[str, Any]] = {
    "llm/api": FAKE, "llm/openai": FAKE, "llm/anthropic": FAKE, "llm/fake": {}, "llm/identity": {}, "llm/hf": {"backend": "api", **FAKE},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "vlm/api": FAKE, "vlm/identity": {}, "conditioner/vlm": {"vlm": VLM}, "embedding/api": FAKE, "embedding/minilm": {},
    "embedding/identity": {}, "agent/llm": {"llm": {"block_type": "llm/api", "config": FAKE}}, "agent/api": FAKE,
    "agent/react": {"llm": {"block_type": "llm/api", "config": FAKE}}, "agent/identity": {},
}  # fmt: skip
PICTURE = np.full((1, 3, 4, 5), 0.5, np.float32)


def build(block_type: str, **config: Any) -> Block:
    return default_registry().build({"block_type": block_type, "config": config})


def one(block: Block, port: str) -> Graph:
    """The block alone, with all its ports."""
    graph = Graph("g")
    graph.add_node(block, "a")
    for p in block.input_ports:
        graph.expose_input("a", p.name, p.name)
    for name in block.port_index.outputs:
        graph.expose_output("a", name, name)
    return graph


@pytest.mark.parametrize(("block_type", "config"), {**LLMS, **OTHERS}.items())
def test_types_of_the_table_keep_the_ports_of_their_role(block_type: str, config: dict[str, Any]) -> None:
    """01 T-14 to T-17, T-23, F-30: each builds without weights, key or network; canonical ports with their aliases."""
    block = build(block_type, **config)
    assert role_issues(block) == []
    contract = KNOWN_ROLES[block_type.split("/")[0]]
    for port in contract.ports:
        own = block.port_index.by_name.get(port.name)
        if own is not None and block_type != "conditioner/vlm":
            assert set(port.aliases) <= set(own.aliases), f"{port.name} is also called {port.aliases}"
            assert own.streamable or not port.streamable or block_type == "vlm/identity"
        if own is not None and port.direction == "in":
            assert own.aggregation == port.aggregation
    assert Graph.from_config(one(block, "a").to_config()).to_config() == one(block, "a").to_config()


@pytest.mark.parametrize(("block_type", "config"), LLMS.items())
def test_a_language_model_takes_every_form_of_prompt_and_context(block_type: str, config: dict[str, Any]) -> None:
    """01 T-14: a text, a batch of texts, messages; context as text, list and dict, joined; aliases; no unknown setting."""
    block = build(block_type, **config)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
    for prompt, kind in (("Who?", str), (messages, str), (["Who?", "Where?"], (list, str))):
        for context in (None, "It rains.", ["a", {"text": "b", "source": "c"}], {"sky": "grey", "sea": ["rough"]}):
            given = {"prompt": prompt, "system": "You are a clerk.", **({"context": context} if context else {})}
            assert isinstance(block.run(given)["text"], kind)
    wired = one(block, "a")
    assert wired.run({"prompt": "x"})["text"] is not None and block.port_index.outputs["text"].streamable
    if block_type != "llm/identity":
        with pytest.raises(ConfigError, match=r"params\.temprature is not a setting .*'temperature'"):
            block.run({"prompt": "x", "params": {"temprature": 1}})


def test_a_type_is_named_after_its_provider() -> None:
    """01 T-14, F-35: llm/openai and llm/anthropic are their providers unless another one is said; llm/api must say."""
    for name in ("openai", "anthropic"):
        for more in ({}, {"backend": "api"}):
            block = build(f"llm/{name}", model_id="m", **more)
            assert block.model == f"{name}/m" and block.to_config()["config"] == {"model_id": "m", **more}  # type: ignore[attr-defined]
    assert build("llm/openai", **FAKE).model == "fake/m"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="needs a provider"):
        build("llm/api", model_id="m")


@pytest.mark.parametrize(("block_type", "config"), [("vlm/api", FAKE), ("conditioner/vlm", {"vlm": VLM})])
def test_a_picture_may_be_an_array_an_artifact_or_a_list(block_type: str, config: dict[str, Any]) -> None:
    """01 T-15, T-9: `image` as image, ref and list; what is no picture is refused; the same answer for the same picture."""
    blobs = MemoryBlobs()
    png = to_png(np.rint(PICTURE[0].transpose(1, 2, 0) * 255).astype(np.uint8))
    sha = blobs.put(png)
    assert sha == hashlib.sha256(png).hexdigest()
    block = build(block_type, **config)
    graph, port = one(block, "a"), "image" if block_type == "vlm/api" else "input"

    def said(picture: Any) -> Any:
        out = graph.run({port: picture, "prompt": "What?"}, seed=1, blobs=blobs)
        return out["text"] if block_type == "vlm/api" else out["embedding"]["text"]

    alone = said(PICTURE)
    assert isinstance(alone, str) and said(f"blob:{sha}") == said({"id": sha, "media_type": "image/png"}) == alone
    assert len(said([PICTURE, {"id": sha}])) == len(said(np.concatenate([PICTURE] * 2))) == 2
    for wrong in ([PICTURE[0]], ["no picture of ours"], [np.full((1, 3, 2, 2), np.nan)]):
        with pytest.raises(Exception, match=r"image|picture|blob"):
            said(wrong)


@pytest.mark.parametrize(("block_type", "config"), [("vlm/api", FAKE), ("vlm/identity", {})])
def test_what_is_asked_of_a_picture_may_be_called_text_as_the_answer_is(block_type: str, config: dict[str, Any]) -> None:
    """01 T-15, T-3: the input `prompt` has the alias `text`, told from the output `text` by its direction."""
    block = build(block_type, **config)
    wanted = block.run({"image": PICTURE, "prompt": "What?"})["text"]
    assert block.run({"image": PICTURE, "text": "What?"})["text"] == wanted
    graph = Graph("g")
    graph.add_node(block, "see", defaults={"image": PICTURE})
    graph.add_node(block, "again", defaults={"image": PICTURE})
    assert graph.add_edge("see", "text", "again", "text").target_port == "prompt"
    graph.expose_input("see", "text", "asked")
    graph.expose_output("again", "text", "said")
    assert graph.run({"asked": "What?"})["said"] and graph.get_input_spec()[0]["port_name"] == "prompt"
    assert block.get_port("text").direction == "out"


def test_a_picture_conditions_as_a_vector_of_what_is_seen_in_it() -> None:
    """01 T-9, T-15: with an embedding model a tensor [B,1,D] and `pooled` [B,D]; both models are those of the pool."""
    pool, near = ModelPool(), {"block_type": "embedding/api", "config": FAKE}
    config = {"block_type": "conditioner/vlm", "config": {"vlm": VLM, "embedding": near}}
    block, other = (default_registry().build(config, pool=pool) for _ in range(2))
    assert block.vlm is other.vlm and block is not other and len(pool) == 2  # type: ignore[attr-defined]
    out = block.run({"input": np.concatenate([PICTURE, PICTURE * 0])})
    assert out["embedding"].shape == (2, 1, 64) and out["pooled"].shape == (2, 64) and not out["pooled"].requires_grad
    assert [*build("conditioner/vlm", vlm=VLM).run({"input": PICTURE, "schema": {"type": "object"}})["embedding"]] == ["text", "data"]
    with pytest.raises(ConfigError, match="vlm is a block of role 'vlm'"):
        build("conditioner/vlm", vlm=near)


@pytest.fixture
def server() -> Any:
    with serving() as running:
        yield running
        close_clients()


def test_vectors_of_texts_pictures_and_lists_of_both(server: ApiServer) -> None:
    """01 T-16: one vector for one, a list for a list; pictures only where the server's way to take them is said."""
    where = {"endpoint_url": server.url, "model_id": "clip-1", "max_retries": 0}
    rows = [{"index": i, "embedding": [float(i), 1.0]} for i in range(3)]

    def reply(n: int) -> dict[str, Any]:
        return {"json": {"data": rows[:n], "usage": {"prompt_tokens": 1}}}

    server.replies.extend([reply(1), reply(3), reply(2), reply(2)])
    block = build("embedding/api", **where, images="object")
    assert block.run({"input": PICTURE})["embedding"] == [0.0, 1.0]
    assert len(block.run({"input": ["a", PICTURE, "b"]})["embedding"]) == 3
    assert len(block.run({"input": np.concatenate([PICTURE] * 2)})["embedding"]) == 2
    assert len(build("embedding/api", **where, images="data_url").run({"input": ["a", PICTURE]})["embedding"]) == 2
    sent = [body["input"] for _, _, body in server.seen]
    assert sent[0][0]["image"].startswith("iVBOR") and [next(iter(v)) for v in sent[1]] == ["text", "image", "text"]
    assert sent[3] == ["a", f"data:image/png;base64,{sent[0][0]['image']}"]
    plain = build("embedding/api", **where)
    for wrong in (PICTURE, ["a", PICTURE], "", [""], [7], [None], [["a"]]):
        with pytest.raises(PortValueError, match=r"say how with images|none of them empty|, not "):
            plain.run({"input": wrong})
    assert len(server.seen) == 4
    vectors = build("embedding/api", **FAKE, images="object").run({"input": ["the tide", "the tide turns", PICTURE]})["embedding"]
    assert float(np.dot(vectors[0], vectors[1])) > float(np.dot(vectors[0], vectors[2]))


def test_an_agent_is_its_model_and_its_settings_in_one_place(server: ApiServer) -> None:
    """01 T-17, F-38: agent/api builds llm/api from its own words, in the pool; conversations stay apart."""
    words = {"endpoint_url": server.url, "model_id": "tale-1", "max_retries": 0, "max_calls": 2}
    call = [{"id": "c", "type": "function", "function": {"name": "calc", "arguments": '{"expression": "6 * 7"}'}}]
    server.replies.extend([chat(None, "tool_calls", tool_calls=call), chat("It is 42.")])
    pool = ModelPool()
    graph = Graph.from_template("agent_with_tools", agent={"block_type": "agent/api", "config": words}, tools=["tool/calc"], pool=pool)
    assert graph.run({"prompt": "six times seven?"})["response"] == "It is 42."
    assert len(pool) == 1 and server.seen[0][2]["tools"][0]["function"]["name"] == "calc"
    graph.add_node("agent/api", "second", config=words, pool=pool)
    graph.expose_input("second", "context", "more")
    first, second = (graph.nodes[n].child for n in ("agent", "second"))
    assert first.llm is second.llm and first.messages and not second.messages and first.model_ref() is None  # type: ignore[attr-defined]
    assert graph.validate(strict=False).is_valid
    for wrong in ({"model_id": "m"}, {**words, "hystory": 3}, {**words, "api_key": "x"}):
        with pytest.raises(ConfigError):
            build("agent/api", **wrong)
    assert build("agent/llm", backend="api", **FAKE).calling == "native"  # type: ignore[attr-defined]


def test_an_agent_may_think_before_it_acts() -> None:
    """01 T-17: agent/react says a thought before each call and answer, under the same schema."""
    script = [
        {"thought": "I should compute it.", "tool": "calc", "arguments": {"expression": "6 * 7"}},
        {"thought": "That is it.", "answer": "It is 42."},
    ]
    llm = {"block_type": "llm/fake", "config": {"script": script}}
    part = {"block_type": "agent/react", "config": {"llm": llm, "thought_chars": 40}}
    graph = Graph.from_template("agent_with_tools", agent=part, tools=["tool/calc"])
    requests: list[Any] = []
    assert graph.run({"prompt": "go"}, callbacks=[lambda e: requests.append(e.data) if e.kind == "model_call" else None])["response"] == "It is 42."
    forms = requests[0]["request"]["schema"]["anyOf"]
    assert [f["required"] for f in forms] == [["thought", "tool", "arguments"], ["thought", "answer"]]
    assert "I should compute it." in json.dumps(requests[1]["request"]["messages"])
    for wrong in ({"thought_chars": 0}, {"calling": "native", "llm": {"block_type": "llm/api", "config": FAKE}}):
        with pytest.raises(ConfigError, match="agent/react"):
            build("agent/react", **{"llm": llm, **wrong})

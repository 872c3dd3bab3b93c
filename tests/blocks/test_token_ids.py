"""The tokens of an answer of a local language model: what they are, and that they are made only where they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lm import save_tiny_lm

from wg_blocks.llm_local import CausalLM
from wg_core import Graph
from wg_core.execution.calls import CallLog

SMALL = {"max_new_tokens": 24, "seed": 5}


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return CausalLM(checkpoint_ref=str(save_tiny_lm(tmp_path_factory.mktemp("tiny"))))


def test_token_ids_are_those_that_were_written(block: CausalLM) -> None:
    """01 T-14, E-14: their text is the answer before anything is cut off; a batch is padded with what no answer holds."""

    def ids(out: dict[str, Any]) -> list[list[int]]:
        assert out["token_ids"].dtype is torch.int64 and out["token_ids"].ndim == 2
        return out["token_ids"].tolist()

    def text(row: list[int]) -> str:
        return block.tokenizer.decode(row, skip_special_tokens=True)

    one = block.run({"prompt": "One.", "params": SMALL})
    (row,) = ids(one)
    assert len(row) == one["usage"]["completion_tokens"] and text(row).strip() == one["text"]
    stop = one["text"][len(one["text"]) // 2]
    cut = block.run({"prompt": "One.", "params": {**SMALL, "stop": stop}})
    (short,) = ids(cut)
    assert short == row[: len(short)] and text(short).strip().startswith(cut["text"] + stop)
    schema = {"type": "array", "items": {"enum": ["storm", "ice"]}, "minItems": 2, "maxItems": 2}
    under = block.run({"prompt": ["One.", "Two."], "schema": schema, "params": SMALL})
    assert [text(r) for r in ids(under)] == under["text"]
    end, limits = block.tokenizer.eos_token_id, {"max_new_tokens": 40, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    for seed in range(20):
        several = block.run({"prompt": ["One.", "Two.", "Three."], "params": {**limits, "seed": seed}})
        rows = ids(several)
        wrote = [[t for t in r if t != end] for r in rows]
        assert all(r == w + [end] * (len(r) - len(w)) for r, w in zip(rows, wrote, strict=True))
        assert [text(r).strip() for r in rows] == several["text"]
        assert sum(map(len, wrote)) == several["usage"]["completion_tokens"]
        if len(set(map(len, wrote))) > 1:
            break
    else:
        pytest.fail("no seed ended one answer before another")
    assert "token_ids" not in block.run({"prompt": [], "params": SMALL})


def test_token_ids_are_made_and_recorded_only_where_they_are_read(block: CausalLM) -> None:
    """01 T-14: who reads only the text pays nothing; a replay gives them without the model."""

    def graph(of: CausalLM, *ports: str) -> Graph:
        made = Graph("g")
        made.add_node(of, "llm", defaults={"params": SMALL})
        made.expose_input("llm", "prompt", "prompt")
        for port in ports:
            made.expose_output("llm", port, port)
        return made

    asked = {"prompt": "One."}
    quiet, told, caught = CallLog(), CallLog(), CallLog()
    graph(block, "text").run(asked, seed=1, calls=quiet)
    out = graph(block, "text", "token_ids").run(asked, seed=1, calls=told)
    seen = graph(block, "text").run(asked, seed=1, calls=caught, capture=["llm:token_ids"])
    assert "token_ids" not in quiet.calls[0] and told.calls == caught.calls
    assert told.calls[0]["token_ids"] == out["token_ids"][0].tolist() == seen["llm:token_ids"][0].tolist()
    absent = CausalLM(checkpoint_ref=block.checkpoint_ref)
    again = graph(absent, "text", "token_ids").run(asked, seed=1, calls=CallLog(told.calls))
    assert torch.equal(again["token_ids"], out["token_ids"]) and not absent.materialized

"""Forecast and replay of language model nodes: what they will ask, and what they answered, without weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lm import save_tiny_lm

from wg_blocks.forecast import forecast, totals
from wg_blocks.llm_fake import FakeLLM
from wg_blocks.llm_local import CausalLM
from wg_blocks.text import Template
from wg_core import Graph, Pipeline
from wg_core.errors import ConfigError, NodeExecutionError, ReplayError
from wg_core.execution.calls import CallLog

SCHEMA = {"type": "object", "properties": {"n": {"enum": ["one", "two"]}}, "required": ["n"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("tiny"))


def write(ref: str) -> Graph:
    """A prompt from a template, and a local model that answers it under a schema, with context."""
    graph = Graph("write")
    graph.add_node(Template(template="The harbour town sleeps: {{ what }}"), "prompt")
    params = {"max_new_tokens": 30, "context_tokens": 50, "max_repairs": 1}
    defaults = {"params": params, "system": "A storm lands at night.", "schema": SCHEMA}
    graph.add_node(CausalLM(checkpoint_ref=ref), "llm", defaults=defaults)
    graph.add_edge("prompt", "text", "llm", "prompt")
    graph.expose_input("prompt", "what", name="what")
    graph.expose_input("llm", "context", name="context")
    graph.expose_output("llm", "data", name="data")
    return graph


def test_tokens_are_counted_by_the_model_s_tokenizer(folder: Path) -> None:
    """The template without its names, and the system text, by the tokenizer of the store; no weights."""
    graph = write(str(folder))
    (row,) = forecast(graph)
    llm = graph.nodes["llm"].child
    assert isinstance(llm, CausalLM)
    counted = llm.count_tokens("The harbour town sleeps: ") + llm.count_tokens("A storm lands at night.")
    assert counted > 0 and not llm.materialized
    assert row == {
        "path": "llm", "model": str(folder), "calls": 1, "calls_at_most": 2, "per_item": False, "prompt_tokens": counted,
        "context_tokens": 50, "completion_tokens": 30, "counted_by": "tokenizer",
    }  # fmt: skip
    assert totals([row, row]) == {
        "calls": 2, "calls_at_most": 4, "prompt_tokens": 2 * (counted + 50), "completion_tokens": 60,
    }  # fmt: skip


def test_words_where_the_model_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WG_HOME", str(tmp_path))
    (row,) = forecast(write("smollm2-135m-instruct"))
    assert (row["counted_by"], row["prompt_tokens"], row["model"]) == ("words", 6 + 7, "smollm2-135m-instruct")


def test_levels_batches_and_context(folder: Path) -> None:
    """Paths go through pipelines; a template over a list asks once per item; unfed context costs nothing."""
    graph = Graph("each")
    graph.add_node(Template(template="Say: {{ x }}", each="x"), "prompt")
    graph.add_node(FakeLLM(), "llm")
    graph.add_edge("prompt", "text", "llm", "prompt")
    pipeline = Pipeline("p")
    pipeline.add_graph(graph, "first")
    (row,) = forecast(pipeline, "stage")
    assert (row["path"], row["per_item"], row["context_tokens"]) == ("stage/first/llm", True, 0)


def test_a_forecast_loads_neither_torch_nor_transformers(folder: Path) -> None:
    """Its cost is that of reading a tokenizer file."""
    code = (
        "import sys\nfrom wg_core import Graph\nfrom wg_blocks.llm_local import CausalLM\n"
        "from wg_blocks.forecast import forecast\ng = Graph('g')\n"
        "g.add_node(CausalLM(checkpoint_ref=sys.argv[1]), 'llm', defaults={'system': 'A storm.'})\n"
        "assert list(forecast(g))[0]['counted_by'] == 'tokenizer'\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_a_local_model_is_replayed_without_its_files(folder: Path, tmp_path: Path) -> None:
    """Recorded with the real model, replayed by a block whose weights and tokenizer are gone; other requests are named."""
    ref = tmp_path / "model"
    folder.rename(ref)
    try:
        inputs = {"what": "the bell", "context": [{"text": "The ferry waits.", "source": "s"}]}
        log = CallLog()
        out = write(str(ref)).run(inputs, seed=4, calls=log)
        (call,) = log.calls
        assert call["place"] == "llm" and call["model"] == str(ref) and call["usage"]["calls"] >= 1
        assert "The ferry waits." in call["messages"][-1]["content"]
    finally:
        ref.rename(folder)
    graph, replay = write(str(ref)), CallLog(log.calls)
    assert graph.run(inputs, seed=4, calls=replay) == out
    llm = graph.nodes["llm"].child
    assert isinstance(llm, CausalLM) and not llm.materialized
    for other in ({"seed": 5}, {"seed": 4, "what": "a gull"}):
        asked = {**inputs, **{k: v for k, v in other.items() if k == "what"}}
        with pytest.raises(NodeExecutionError) as caught:
            graph.run(asked, seed=other["seed"], calls=CallLog(log.calls))
        assert isinstance(caught.value.__cause__, ReplayError)
    with pytest.raises(NodeExecutionError) as caught:
        graph.run(inputs, seed=4)
    assert isinstance(caught.value.__cause__, ConfigError)  # there is no such model any more

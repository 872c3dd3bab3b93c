"""Language models by llama.cpp: the same ports, a GGUF file of the store, decoding under a schema."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from wg_blocks.json_schema import problems
from wg_blocks.llm_gguf import GGUF
from wg_blocks.llm_local import CausalLM
from wg_blocks.store import ModelStore
from wg_core import Graph, ModelPool
from wg_core.assembly.registry import default_registry
from wg_core.errors import AbortRun, ConfigError, MissingModelError, PortValueError

INSTALLED = importlib.util.find_spec("xllamacpp") is not None
CONFIG = {"block_type": "llm/hf", "config": {"backend": "llama_cpp", "checkpoint_ref": "smollm2-135m-instruct-gguf"}}


def test_a_backend_of_the_type_with_the_same_ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # proves 01 F-30, F-32 for llama_cpp: nothing is loaded before the first call
    monkeypatch.setenv("WG_HOME", str(tmp_path))
    block = default_registry().build(CONFIG, pool=ModelPool())
    assert isinstance(block, GGUF) and block.ports == CausalLM.ports and block.backend == "llama_cpp"
    assert block.to_config() == CONFIG and block.weight_hash() is None and block.state_dict() == {}
    with pytest.raises(MissingModelError, match="wg models pull smollm2-135m-instruct-gguf"):
        block.run({"prompt": "Hi"})
    with pytest.raises(ConfigError, match="no_repeat_ngram"):
        block.run({"prompt": "Hi", "params": {"no_repeat_ngram": 4}})
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(MissingModelError, match="no GGUF file"):
        GGUF(checkpoint_ref=str(tmp_path / "other.safetensors")).materialize()


def test_without_the_package_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    code = (
        "import sys; sys.modules['xllamacpp'] = None\n"  # as if it were not installed
        "from wg_blocks.llm_gguf import GGUF; GGUF(checkpoint_ref=sys.argv[1]).run({'prompt': 'Hi'})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.gguf")], capture_output=True, text=True)
    assert "MissingExtraError: backend llama_cpp needs xllamacpp: pip install" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra llama_cpp")
def test_the_shipped_model_by_llama_cpp() -> None:
    """03 W-22, 01 T-14; fetches the file once if it is not in the store."""
    ModelStore().pull("smollm2-135m-instruct-gguf")
    block: Any = default_registry().build(CONFIG, pool=ModelPool())
    ask = {
        "prompt": "A storm lands in a small harbour town. Tell what happens next.",
        "params": {"seed": 1, "max_new_tokens": 40},
    }
    out = block.run(ask)
    assert len(set(out["text"].lower().split())) > 8 and out["usage"]["completion_tokens"] <= 40
    assert block.run({**ask, "params": {"seed": 2, "max_new_tokens": 40}})["text"] != out["text"]
    other = GGUF(checkpoint_ref="smollm2-135m-instruct-gguf")
    assert other.run(ask)["text"] == out["text"]
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["calm", "stormy"]}, "line": {"type": "string", "maxLength": 60}},
        "required": ["mood", "line"],
        "additionalProperties": False,
    }
    told = block.run({"prompt": "How is the sea?", "schema": schema, "params": {"seed": 1}})
    assert problems(schema, told["data"]) == []
    assert block._marks.sub("", "<|im_end|>") == ""
    with pytest.raises(PortValueError, match="holds 4096"):
        block.run({"prompt": "word " * 6000})
    graph, cancel = Graph("g"), threading.Event()
    graph.add_node(block, "llm")
    timer = threading.Timer(1, cancel.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(AbortRun):
        graph.run({"llm:prompt": "Tell a long story.", "llm:params": {"max_new_tokens": 2000}}, cancel=cancel)
    assert time.monotonic() - started < 2

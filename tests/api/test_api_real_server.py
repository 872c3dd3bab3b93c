"""A real language model behind a server that others wrote, `transformers serve`, through the real client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from test_api_streams import graph_of, read

from wg_blocks.api import close_clients
from wg_blocks.llm_local import CausalLM
from wg_blocks.store import ModelStore
from wg_core.assembly.registry import default_registry

pytestmark = pytest.mark.slow
ASKED: dict[str, Any] = {"prompt": "Say hello in five words.", "params": {"max_new_tokens": 12, "temperature": 0}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URL of a running server, and the folder of its model; fetches the model once if it is not in the store."""
    folder = str(ModelStore().pull("smollm2-135m-instruct"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("wb") as out:
        command = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "transformers"), *command], stdout=out, stderr=out, env=environment
        )
        try:
            for _ in range(300):
                assert server.poll() is None, log.read_text()[-2000:]
                try:
                    httpx2.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False)
                    break
                except httpx2.TransportError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", folder
        finally:
            close_clients()
            server.terminate()
            server.wait(30)


@pytest.mark.parametrize("wire", ["chat", "responses"])
def test_it_writes_what_the_model_writes_here(wire: str, served: tuple[str, str]) -> None:
    """04 X-1, 01 F-30, F-31: the same text as the same weights in this process, whole and in pieces, with its tokens."""
    url, folder = served
    words = {"endpoint_url": url, "model_id": folder, "options": {"wire": wire}, "timeout_s": 300}
    block = default_registry().build({"block_type": "llm/api", "config": words})
    out = block.run(ASKED)
    local = CausalLM(checkpoint_ref="smollm2-135m-instruct")
    here = local.run({**ASKED, "params": {**ASKED["params"], "repetition_penalty": 1.0}})
    assert out["text"] == here["text"]
    assert out["usage"]["prompt_tokens"] == here["usage"]["prompt_tokens"] and out["usage"]["completion_tokens"] > 1
    pieces, streamed = read(graph_of(block), ASKED)
    assert len(pieces) > 3 and "".join(pieces).strip() == streamed["text"] == out["text"]
    assert streamed["usage"]["prompt_tokens"] == out["usage"]["prompt_tokens"]

"""What all tests of blocks behind an API share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_server import KEY, ApiServer, serving

from wg_blocks.api import close_clients
from wg_core import Block
from wg_core.assembly.registry import default_registry


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A server of its own, its key in the environment, and no client left over."""
    monkeypatch.setenv("WG_TEST_KEY", KEY)
    with serving() as running:
        yield running
        close_clients()


@pytest.fixture
def api(server: ApiServer) -> Callable[..., Block]:
    """Builds a block of a type behind the server."""

    def build(block_type: str = "llm/api", **config: Any) -> Block:
        words = {"endpoint_url": server.url, "model_id": "tale-1", "api_key_env": "WG_TEST_KEY", "max_retries": 1}
        return default_registry().build({"block_type": block_type, "config": {"backend": "api", **words, **config}})

    return build

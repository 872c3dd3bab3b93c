"""Blocks behind an API are words first: building needs no key, no network and no provider's package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_server import KEY, ApiServer

from wg_blocks.api import Endpoint, ProviderRegistry, close_clients
from wg_blocks.api.fake import Fake
from wg_blocks.api.providers import client_for
from wg_blocks.llm_local import CausalLM
from wg_core import Block, Graph, ModelPool
from wg_core.assembly.registry import default_registry
from wg_core.errors import ApiResponseError, ConfigError, MissingCredentialError, UnknownBlockTypeError

TYPES = ("llm/api", "vlm/api", "embedding/api", "generator/api", "speech/api", "transcription/api")


def build(block_type: str = "llm/api", **config: Any) -> Block:
    return default_registry().build({"block_type": block_type, "config": config})


DRY = """
import socket, sys
def refuse(*a, **k): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from wg_core import Graph
inputs = {"llm": "prompt", "vlm": "image", "embedding": "input", "generator": "prompt", "speech": "text", "transcription": "audio"}
for block_type, given in ((f"{role}/api", port) for role, port in inputs.items()):
    graph = Graph("g")
    graph.add_node(block_type, "a", config={"backend": "api", "provider": "openai", "model_id": "m", "api_key_env": "NOT_SET"})
    graph.expose_input("a", given, name=given)
    assert graph.validate().is_valid
    graph.run({given: "x"}, dry_run=True)
    assert Graph.from_config(graph.to_config()).to_config() == graph.to_config()
from wg_blocks.templates import stub
from wg_core import World
config = stub("far")
config["execution"]["models"]["text"] = {"block_type": "llm/api", "config": {"backend": "api", "provider": "anthropic", "model_id": "m"}}
world = World.from_config(config)
assert world.validate(deep=True).is_valid and set(world.dry_run()) == set(world.stages)
assert not {"openai", "anthropic", "httpx2", "torch", "transformers"} & set(sys.modules), sorted(sys.modules)
"""


def test_build_validate_and_dry_run_need_nothing() -> None:
    """01 F-31, T-23, A-7, 04 X-1: blocks of every role and a whole world: no key, no network, no import of a provider's package."""
    subprocess.run([sys.executable, "-W", "error", "-c", DRY], check=True, env={"PATH": "/usr/bin:/bin"}, timeout=60)


@pytest.mark.parametrize("block_type", TYPES)
def test_what_is_missing_is_named_at_building(block_type: str) -> None:
    """01 F-32."""
    with pytest.raises(ConfigError, match=r"config\.model_id: Field required"):
        build(block_type, backend="api", provider="fake")
    with pytest.raises(
        ConfigError, match=r"model_id 'm' needs a provider or an endpoint_url; providers: anthropic, fake, openai"
    ):
        build(block_type, model_id="m")
    with pytest.raises(ConfigError, match=r"provider 'opnai' is not registered; did you mean 'openai'"):
        build(block_type, model_id="m", provider="opnai")
    with pytest.raises(ConfigError, match=r"config\.temprature: Extra inputs"):
        build(block_type, model_id="m", provider="fake", temprature=1)


def test_any_type_of_the_role_takes_the_backend_and_no_other() -> None:
    """01 F-30, F-32: the same ports as the local form; an unknown backend lists what there is."""
    block = build("llm/hf", backend="api", provider="fake", model_id="m")
    assert [p for p in block.ports if not p.name.startswith("tool")] == list(CausalLM.ports)
    assert block.to_config()["config"] == {"backend": "api", "provider": "fake", "model_id": "m"}
    assert block.run({"prompt": "x"})["text"]
    for backend in ("vllm", "apy"):
        with pytest.raises(UnknownBlockTypeError, match=r"it has 'api', .*'local'"):
            build("llm/hf", backend=backend, model_id="m")
    both = {"backend": "api", "provider": "fake", "model_id": "m", "checkpoint_ref": "x"}
    with pytest.raises(ConfigError, match="not both"):
        ModelPool().get_or_build({"block_type": "llm/hf", "config": both}, default_registry())


def test_no_weights_no_parameters() -> None:
    """01 F-34."""
    block = build(model_id="m", provider="fake")
    assert block.state_dict() == {} and block.trainable_parameters() == [] and block.adapter_slots() == []
    assert block.freeze() is block


@pytest.mark.parametrize(
    "config",
    [
        {"api_key": KEY}, {"authorization": f"Bearer {KEY}"}, {"api_key_env": KEY}, {"api_key_env": "0a1b2c3d4e5f0a1b2c3d4e5f"},
        {"extra_body": {"headers": {"x-api-key": KEY}}}, {"options": {"h": f"Bearer {KEY}"}}, {"options": {"list": [KEY]}},
        {"endpoint_url": f"https://user:{KEY}@example.org/v1"}, {"endpoint_url": f"https://{KEY}@example.org/v1"},
        {"endpoint_url": f"https://example.org/v1?api-key={KEY}"}, {"endpoint_url": f"https://example.org/v1#{KEY}"},
    ],
)  # fmt: skip
def test_literal_secrets_are_refused_and_not_shown(config: dict[str, Any]) -> None:
    """01 F-33, A-7: under any name, as a header, or inside the URL."""
    with pytest.raises(ConfigError) as caught:
        build(provider="openai", model_id="m", **config)
    assert KEY not in str(caught.value) and "0a1b2c" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["ftp://example.org", "example.org/v1", "file:///etc/passwd", "https://", "env:lower", "https://a b"]
)
def test_urls_that_are_none(url: str) -> None:
    """01 F-32."""
    with pytest.raises(ConfigError):
        build(model_id="m", endpoint_url=url)


def test_a_key_does_not_travel_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """01 F-33."""
    words: dict[str, Any] = {"model_id": "m", "endpoint_url": "http://models.example.org/v1"}
    build(**words)  # no key, nothing to lose
    build(**words, api_key_env="K", allow_http=True)
    with pytest.raises(ConfigError, match=r"a key would travel in the clear to models\.example\.org"):
        build(**words, api_key_env="K")
    monkeypatch.setenv("MUSE_URL", "http://models.invalid/v1")
    monkeypatch.setenv("K", KEY)
    there: dict[str, Any] = {"model_id": "m", "endpoint_url": "env:MUSE_URL", "max_retries": 0}
    with pytest.raises(ConfigError, match=r"what MUSE_URL holds: a key would travel in the clear to models\.invalid"):
        build(**there, api_key_env="K").run({"prompt": "x"})
    for config in ({}, {"api_key_env": "K", "allow_http": True}):
        with pytest.raises(ApiResponseError, match="cannot be reached"):
            build(**there, **config).run({"prompt": "x"})


def test_a_missing_key_is_named_at_the_first_call(
    api: Callable[..., Block], server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """01 F-31, A-7: MissingCredentialError names the variable; nothing was sent."""
    for block_type, inputs in (("llm/api", {"prompt": "x"}), ("embedding/api", {"input": "x"})):
        with pytest.raises(MissingCredentialError, match="WG_NO_KEY"):
            api(block_type, api_key_env="WG_NO_KEY").run(inputs)
    monkeypatch.setenv("WG_NO_KEY", "two\nlines")
    with pytest.raises(MissingCredentialError, match="WG_NO_KEY holds is no key"):
        api(api_key_env="WG_NO_KEY").run({"prompt": "x"})
    assert server.seen == []
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(MissingCredentialError, match="OPENAI_API_KEY"):
        build(model_id="m", provider="openai").run({"prompt": "x"})
    with pytest.raises(ConfigError, match="MUSE_URL is to hold endpoint_url"):
        build(model_id="m", endpoint_url="env:MUSE_URL").run({"prompt": "x"})


def test_the_own_key_of_openai_goes_nowhere_else(
    api: Callable[..., Block], server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """01 F-33: without api_key_env no key, organization or header of the environment is sent to another endpoint."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nX-Mine: {KEY}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    api(api_key_env=None).run({"prompt": "x"})
    _, headers, body = server.seen[0]
    assert KEY not in str(headers) + str(body) and "authorization" not in headers


def test_a_proxy_is_used_when_asked_for(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """01 F-33: never by the environment alone."""
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    words: dict[str, Any] = {"model_id": "m", "endpoint_url": "http://models.invalid/v1", "max_retries": 0}
    with pytest.raises(ApiResponseError, match="cannot be reached"):
        build(**words).run({"prompt": "x"})
    assert build(**words, proxy_from_env=True).run({"prompt": "x"})["text"].startswith("An answer")
    assert [path for path, _, _ in server.seen] == ["http://models.invalid/v1/chat/completions"]


def test_an_address_from_the_environment(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """04 X-1: endpoint_url env:NAME."""
    monkeypatch.setenv("MUSE_URL", server.url + "/")
    assert build(model_id="m", endpoint_url="env:MUSE_URL").run({"prompt": "x"})["text"].startswith("An answer")
    assert server.seen[0][0] == "/v1/chat/completions"


def test_one_block_and_one_client() -> None:
    """01 F-35, F-37, 04 X-2: equal words are one block; equal endpoint and key source one client."""
    pool, registry = ModelPool(), default_registry()

    def get(**config: Any) -> Any:
        words = {"backend": "api", "provider": "fake", "model_id": "m", **config}
        return pool.get_or_build({"block_type": "llm/api", "config": words}, registry)

    one, other = get(), get(model_id="n")
    assert one is get() and one is not other and one is not get(timeout_s=5) and one is not get(reuse=False)
    assert client_for(one.endpoint) is client_for(other.endpoint)
    assert client_for(one.endpoint) is not client_for(get(options={"script": ["a"]}).endpoint)
    slash, bare = (get(endpoint_url=f"http://127.0.0.1:1/v1{end}").endpoint for end in ("/", ""))
    assert client_for(slash) is client_for(bare)
    graph = Graph("g")
    for node in ("a", "b"):
        graph.add_node("llm/api", node, config={"provider": "fake", "model_id": "m"}, pool=pool)
    assert graph.nodes["a"].child is graph.nodes["b"].child
    close_clients()


def test_providers_of_packages_and_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """01 F-35: entry points `wg.providers`; a broken plugin is reported, not fatal."""
    for name, code in (
        ("wg_good_api", "def register(p): p.register('third', 'wg_blocks.api.fake:Fake')"),
        ("wg_bad_api", "1/0"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[wg.providers]\n{name} = {name}:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = ProviderRegistry(plugins=True)
    assert registry.names() == ["third"]
    assert isinstance(registry.make(Endpoint("third")), Fake)
    assert registry.broken_plugins == {"wg_bad_api": "ZeroDivisionError: division by zero"}
    assert "wg_bad_api" in caplog.text
    with pytest.raises(ConfigError, match=r"'fourth' is not registered; .*third.*broken plugins: .*wg_bad_api"):
        registry.check("fourth")
    registry.register("third", "wg_blocks.api.fake:Fake")
    with pytest.raises(ConfigError, match="registered already"):
        registry.register("third", "elsewhere:Other")


def test_the_fake_provider_is_deterministic_and_scriptable() -> None:
    """01 F-35, T-23, A-7."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    plain = build(model_id="m", provider="fake")
    assert (
        plain.run({"prompt": "a"})["text"] == plain.run({"prompt": "a"})["text"] != plain.run({"prompt": "b"})["text"]
    )
    scripted = build(
        model_id="m", provider="fake", options={"script": ["first", "no JSON", {"n": 1}, {"fault": "rate_limit"}, "x"]}
    )
    assert scripted.run({"prompt": "a"})["text"] == "first"
    assert scripted.run({"prompt": "a", "schema": schema})["data"] == {"n": 1}  # the broken one was repaired
    assert scripted.run({"prompt": "a"})["text"] == "x"  # the fault was tried again
    with pytest.raises(ConfigError, match="no fault 'flood'"):
        build(model_id="m", provider="fake", options={"script": [{"fault": "flood"}]}).run({"prompt": "a"})
    close_clients()

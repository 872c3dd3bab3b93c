"""The pool: one reference, one instance."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blocks_for_tests import Model, Session, Weights

from wg_core import Block, BlockRegistry, ConfigError, Graph, ModelPool


def model(registry: BlockRegistry, pool: ModelPool, **config: Any) -> Block:
    return registry.build({"block_type": "test/model", "config": config}, pool=pool)


def test_equal_keys_give_the_very_same_object(registry: BlockRegistry, pool: ModelPool) -> None:
    """01 F-37, A-10."""
    one = model(registry, pool, checkpoint_ref="m", width=2)
    assert model(registry, pool, width=2, checkpoint_ref="m") is one
    assert model(registry, pool, checkpoint_ref="m", width=2, backend="local") is one
    assert model(registry, pool, checkpoint_ref="m", width=2, temperature=0.1) is one  # a call-time key
    assert [entry.block for entry in pool.list()] == [one]
    assert one.model_ref() == pool.list()[0].key


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoint_ref": "n"},
        {"checkpoint_ref": "m", "width": 2},
        {"model_id": "m"},
        {"model_id": "m", "provider": "fake"},
        {"model_id": "m", "provider": "fake", "endpoint_url": "http://x"},
        {"checkpoint_ref": "m", "reuse": False},
    ],
)
def test_another_model_or_load_setting_is_another_object(
    other: dict[str, Any], registry: BlockRegistry, pool: ModelPool
) -> None:
    """01 F-36, F-37, A-10: differing load config separates, `reuse: false` too."""
    assert model(registry, pool, checkpoint_ref="m") is not model(registry, pool, **other)


def test_reuse_false_is_private_and_stays_so_in_the_config(registry: BlockRegistry, pool: ModelPool) -> None:
    """01 F-37, 02 G-13."""
    one = model(registry, pool, checkpoint_ref="m", reuse=False)
    two = model(registry, pool, checkpoint_ref="m", reuse=False)
    assert one is not two
    assert len(pool) == 0
    assert one.model_ref() is None
    assert one.to_config()["config"] == {"checkpoint_ref": "m", "reuse": False}
    graph = Graph("g")
    graph.add_node(one, "a")
    graph.add_node(two, "b")
    assert graph.validate().is_valid


def test_blocks_without_a_reference_or_with_a_session_are_never_shared(
    registry: BlockRegistry, pool: ModelPool
) -> None:
    """01 F-37, F-38."""
    assert model(registry, pool) is not model(registry, pool)
    sessions = [registry.build({"block_type": "test/session", "model_id": "m"}, pool=pool) for _ in range(2)]
    assert isinstance(sessions[0], Session)
    assert sessions[0] is not sessions[1]


def test_two_spellings_of_one_file_match(registry: BlockRegistry, pool: ModelPool, tmp_path: Path) -> None:
    """01 F-36: path references are normalised, links resolved."""
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "sub").mkdir()
    spellings = [
        str(file),
        f"{tmp_path}/./weights.safetensors",
        f"{tmp_path}/sub/../weights.safetensors",
        f"{tmp_path}/link",
    ]
    blocks = {id(model(registry, pool, checkpoint_ref=s)) for s in spellings}
    assert len(blocks) == 1


def test_a_local_and_a_remote_reference_exclude_each_other(registry: BlockRegistry, pool: ModelPool) -> None:
    """01 F-36, A-2."""
    with pytest.raises(
        ConfigError, match=r"'test/model': give checkpoint_ref \(local weights\) or model_id \(a remote model\)"
    ):
        model(registry, pool, checkpoint_ref="m", model_id="m")


def test_eight_first_users_at_once_build_one_block(registry: BlockRegistry, pool: ModelPool) -> None:
    """01 F-37: thread-safe; weights are loaded once."""
    built: list[int] = []
    begin = threading.Barrier(8)

    class Slow(Model):
        def __init__(self, **config: Any) -> None:
            built.append(threading.get_ident())
            super().__init__(**config)
            time.sleep(0.1)

    registry.register("test/slow", Slow)

    def first_use(_: int) -> Block:
        begin.wait(timeout=10)
        return registry.build({"block_type": "test/slow", "checkpoint_ref": "m"}, pool=pool)

    with ThreadPoolExecutor(8) as threads:
        blocks = list(threads.map(first_use, range(8)))
    assert len({id(b) for b in blocks}) == 1
    assert len(built) == 1


def test_a_loaders_error_reaches_all_waiters_and_the_next_try_begins_anew(
    registry: BlockRegistry, pool: ModelPool
) -> None:
    """01 F-37: nobody waits for ever, nobody gets half a model."""
    tries: list[int] = []
    begin = threading.Barrier(8)

    class Breaks(Model):
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            tries.append(1)
            if len(tries) == 1:
                time.sleep(0.2)
                raise OSError("disk is gone")

    registry.register("test/breaks", Breaks)

    def first_use(_: int) -> str:
        begin.wait(timeout=10)
        try:
            registry.build({"block_type": "test/breaks", "checkpoint_ref": "m"}, pool=pool)
        except OSError as error:
            return str(error)
        return "built"

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(first_use, range(8)))
    assert results == ["disk is gone"] * 8
    assert len(pool) == 0
    assert registry.build({"block_type": "test/breaks", "checkpoint_ref": "m"}, pool=pool) is pool.list()[0].block


def test_evicting_closes(registry: BlockRegistry, pool: ModelPool) -> None:
    """01 F-17: `close()` is called by the pool."""
    one, two = (model(registry, pool, checkpoint_ref=r) for r in ("m", "n"))
    assert isinstance(one, Model)
    assert isinstance(two, Model)
    pool.evict(pool.list()[0].key)
    assert (one.closed, two.closed, len(pool)) == (True, False, 1)
    pool.clear()
    assert two.closed
    assert len(pool) == 0
    assert model(registry, pool, checkpoint_ref="m") is not one


def test_a_pinned_model_stays_until_it_is_released(registry: BlockRegistry, pool: ModelPool) -> None:
    """03 W-20."""
    one, two = (model(registry, pool, checkpoint_ref=r) for r in ("m", "n"))
    key = next(entry.key for entry in pool.list() if entry.block is one)
    pool.pin(key)
    with pytest.raises(ConfigError, match="pinned; release it first"):
        pool.evict(key)
    pool.clear()
    assert [(e.block, e.pinned, e.nbytes) for e in pool.list()] == [(one, True, 0)]
    assert model(registry, pool, checkpoint_ref="m") is one and model(registry, pool, checkpoint_ref="n") is not two
    pool.release(key)
    pool.clear()
    assert len(pool) == 0 and pool.nbytes == 0
    with pytest.raises(ConfigError, match="holds no model"):
        pool.pin(key)


def test_two_nodes_of_one_model_share_weights_parameters_and_state(registry: BlockRegistry, pool: ModelPool) -> None:
    """01 A-10, 02 acceptance 2: each parameter once, stored once; sharing comes back from the config."""
    graph = Graph("g")
    for name in ("a", "b"):
        graph.add_node("test/weights", name, config={"checkpoint_ref": "w", "scale": 2.0}, registry=registry, pool=pool)
    graph.add_edge("a", "y", "b", "x")
    assert isinstance(graph.nodes["a"].child, Weights)
    assert len(graph.trainable_parameters()) == 1
    assert list(graph.state_dict()) == ["a:weight", "a:steps"]
    again = Graph.from_config(graph.to_config(), registry=registry, pool=ModelPool())
    assert again.nodes["a"].child is again.nodes["b"].child
    assert again.to_config() == graph.to_config()

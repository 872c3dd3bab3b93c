"""One language model for all stages of a world, for several worlds, and for what their prompts begin with."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from tiny_lm import save_tiny_lm

from wg_blocks.decoding import PIECE
from wg_blocks.llm_local import CausalLM
from wg_core import ModelPool, World, register_block
from wg_core.state.store import SnapshotStore
from wg_defs.worker import evolve

FIVE = Path(__file__).parents[2] / "benchmarks" / "five_stages.yaml"


class Counted(CausalLM):
    """A language model that tells when it is loaded, and which copy answers."""

    loads: list[int] = []
    answered: list[int] = []

    def build_modules(self) -> Mapping[str, Any]:
        Counted.loads.append(id(self))
        return super().build_modules()

    def stream_forward(self, inputs: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        Counted.answered.append(id(self.module))
        return super().stream_forward(inputs)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """When these tests run, not when they are read: what is registered then is tried by the contract of blocks."""
    register_block("trial/counted_lm")(Counted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("tiny"))


def config(folder: Path, store: Path, world_id: str, block_type: str = "llm/hf") -> dict[str, Any]:
    """A world of five stages, each of which asks the one model something of its own under one system text."""
    SnapshotStore(store).blobs.put(b"A note.")  # what one of the stages writes about
    made = yaml.safe_load(FIVE.read_text(encoding="utf-8"))
    made["world_id"] = world_id
    made["execution"]["models"]["text"] = {"block_type": block_type, "config": {"checkpoint_ref": str(folder)}}
    made["execution"]["storage"] = {"root": str(store)}
    return made


def test_a_step_computes_what_its_prompts_share_once(folder: Path, tmp_path: Path) -> None:
    """03 W-20: a switch of stages computes no token of the shared system text again; the ledger says so."""
    world = World.from_config(config(folder, tmp_path, "shared"), pool=ModelPool())
    snapshot = world.step(seed=1)
    (block,) = {id(b): b for b in world.iter_blocks() if isinstance(b, CausalLM)}.values()
    system = world.to_config()["execution"]["stages"]["intend"]["graph"]["nodes"][0]["defaults"]["system"]
    chat: Any = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    shared = block._shared(chat, block._prompt_ids(chat))
    rows = [record.usage[block.checkpoint_ref] for record in snapshot.stages if record.usage]
    assert [row["calls"] for row in rows] == [1] * 5 and shared > PIECE
    assert "cached_tokens" not in rows[0]
    assert [row["cached_tokens"] for row in rows[1:]] == [shared] * 4, rows


def test_one_model_answers_in_all_stages_of_several_worlds(folder: Path, tmp_path: Path) -> None:
    """01 F-37, 04 X-2: the very same object in each stage of each world, loaded once."""
    pool = ModelPool()
    Counted.loads, Counted.answered = [], []
    worlds = [World.from_config(config(folder, tmp_path / "store", name, "trial/counted_lm"), pool=pool) for name in ("one", "two")]
    for world in worlds:
        world.step(seed=1)
    (block,) = {id(b) for world in worlds for b in world.iter_blocks() if isinstance(b, CausalLM)}
    assert Counted.loads == [block] and len(Counted.answered) == 10 and len(set(Counted.answered)) == 1


def test_one_model_answers_in_all_runs_of_a_dagster_process(folder: Path, tmp_path: Path) -> None:
    """04 X-2, 05 K-7: two worlds, two runs each, in one process: the same object in each, loaded once."""
    worlds = tmp_path / "worlds"
    worlds.mkdir()
    for name in ("one", "two"):
        made = config(folder, tmp_path / "store", name, "trial/counted_lm")
        (worlds / f"{name}.yaml").write_text(json.dumps(made), encoding="utf-8")
    Counted.loads, Counted.answered = [], []
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.ephemeral(str(tmp_path / "dagster")) as instance:
        for name in ("one", "two"):
            done = evolve(name, 2, seed=1, folders=[worlds], root=tmp_path, instance=instance, mlflow=False)
            assert [e.ok for e in done] == [True, True], done
        assert len({run.run_id for run in instance.get_runs()}) == 4
    assert len(Counted.loads) == 1 and len(Counted.answered) == 20 and len(set(Counted.answered)) == 1

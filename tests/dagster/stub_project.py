"""A project folder with stub worlds, to run on an instance of its own."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from wg_core import Block, Port, World, register_block
from wg_core.assembly.template import default_templates
from wg_core.state.state import BLOCKS
from wg_defs.build import build
from wg_defs.partitions import partitions_name

QUIET = {"console": {"config": {"log_level": "CRITICAL"}}}


def stub_config(world_id: str, store: Path) -> dict[str, Any]:
    """The stub world as plain data, with its snapshots in `store`."""
    config = default_templates().build("world", "stub", {"world_id": world_id})
    config["execution"]["storage"] = {"root": str(store)}
    return config


class Fails(Block):
    """A block that cannot do its work."""

    ports = (Port("text", "out", "text"),)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("the brush broke")


register_block("trial/fails")(Fails)


class Model(Block):
    """A block that counts how often it is built, as a model that is loaded would be."""

    ports = (Port("text", "out", "text"),)
    built = 0

    def __init__(self, *, model_id: str) -> None:
        super().__init__()
        self.model_id = model_id
        Model.built += 1

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"text": f"{self.model_id} says that it rains."}


class Waits(Block):
    """A block that takes as long as the file `path` is there."""

    ports = (Port("text", "out", "text"),)

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        while Path(self.path).exists():
            Path(self.path).with_suffix(".seen").touch()
            time.sleep(0.05)
        return {"text": "At last."}


register_block("trial/model")(Model)
register_block("trial/waits")(Waits)


def developed_by(config: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """The same world with a Development that is one block with the output `text`."""
    config = copy.deepcopy(config)
    config["execution"]["stages"]["development"] = {
        "outputs": {"intent.text": "text"},
        "graph": {
            "id": "say",
            "nodes": [{"node_id": "say", **block}],
            "exposed_outputs": [{"name": "text", "node_id": "say", "port_name": "text"}],
        },
    }
    return config


def failing_creator(config: dict[str, Any]) -> dict[str, Any]:
    """The same world with a maker that fails."""
    config = copy.deepcopy(config)
    dispatch = config["execution"]["stages"]["creator"]["graph"]["nodes"][0]
    dispatch["config"]["makers"]["map"]["block"] = {"block_type": "trial/fails"}
    return config


def write_world(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{config['world_id']}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


@dataclass
class Project:
    """Worlds in a folder, their definitions, and an instance to run them on."""

    root: Path
    instance: dg.DagsterInstance
    mlflow: bool = False

    @property
    def worlds(self) -> Path:
        return self.root / "worlds"

    def world(self, world_id: str = "tide") -> World:
        return World.from_yaml(self.worlds / f"{world_id}.yaml")

    def state(self, blocks: Sequence[int]) -> dict[str, Any]:
        """A state with just these blocks, as a stub world leaves them after two steps."""
        config = stub_config("elsewhere", self.root / "snapshots")
        done = list(World.from_config(config).evolve(2, seed=1))[-1].applied
        assert done is not None
        return {name: done[name] for number, name in enumerate(BLOCKS, 1) if number in blocks}

    def definitions(self) -> dg.Definitions:
        return build([self.worlds], root=self.root / ".wg", mlflow=self.mlflow)

    def job(self, world_id: str = "tide") -> dg.JobDefinition:
        return self.definitions().resolve_job_def(f"{world_id}__evolve")

    def step(self, key: str, world_id: str = "tide", **config: Any) -> dg.ExecuteInProcessResult:
        """Run one step as the page does: add the key if it is new, then the job on that partition."""
        name = partitions_name(world_id)
        if key not in self.instance.get_dynamic_partitions(name):
            self.instance.add_dynamic_partitions(name, [key])
        return self.job(world_id).execute_in_process(
            instance=self.instance,
            partition_key=key,
            run_config={"ops": {f"{world_id}__step": {"config": config}}, "loggers": QUIET},
            raise_on_error=False,
        )


def failure(result: dg.ExecuteInProcessResult) -> tuple[str, str]:
    """The step that failed, and what the page says of it."""
    event = next(e for e in result.all_events if e.is_step_failure)
    said = event.step_failure_data.user_failure_data
    assert said is not None, event.step_failure_data.error
    return str(event.step_key).rpartition(".")[2], str(said.description)


def materialized(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetMaterialization]:
    """What a run made, by the last part of the asset key."""
    made = (e for e in result.all_events if e.is_step_materialization)
    return {m.asset_key.path[-1]: m for m in (e.step_materialization_data.materialization for e in made)}


def job_of(root: str) -> dg.JobDefinition:
    """The step job of the project in `root`, for a re-execution."""
    return build([Path(root) / "worlds"], root=Path(root) / ".wg", mlflow=False).resolve_job_def("tide__evolve")

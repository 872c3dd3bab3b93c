"""A project whose world has a history and a tiny real language model that can learn from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny_lm import save_tiny_lm

from wg_blocks.templates import stub
from wg_core import World
from wg_core.state.store import SnapshotStore

AUTHOR = "author/write/write/llm"


@dataclass
class Tiny:
    """The folder, and the file of the world `tide` in it."""

    root: Path
    file: Path

    @property
    def home(self) -> Path:
        return self.root / ".wg"

    def world(self) -> World:
        return World.from_yaml(self.file)


def tiny_project(root: Path, steps: int = 10) -> Tiny:
    """The world lives with the offline stand-in for a language model, and then takes on the tiny model."""
    config = stub("tide")
    config["execution"]["storage"] = {"root": str(root / "snapshots")}
    for _ in World.from_yaml_text(yaml.safe_dump(config)).evolve(steps, seed=4):
        pass
    model: dict[str, Any] = {"block_type": "llm/hf", "config": {"checkpoint_ref": str(save_tiny_lm(root / "tiny"))}}
    config["execution"]["models"]["text"] = model
    file = root / "worlds" / "tide.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    assert SnapshotStore(root / "snapshots").steps("tide") == list(range(steps))
    return Tiny(root, file)

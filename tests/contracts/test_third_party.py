"""A package from elsewhere: its role, block and wiring rule work everywhere, without a change of the engine."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = '''
from wg_core import Block, Port
from wg_core.assembly.roles import register_role
from wg_core.assembly.rules import Rule, register_rule
from wg_core.weights.module import ModuleBlock


class Gauge(Block):
    """A role of its own: a level of water, read off a signal."""

    role = "gauge"
    ports = (Port("signal", "in", "tensor"), Port("level", "out", "tensor"))


class Source(Block):
    role = "spring"
    ports = (Port("height", "in", "number"), Port("signal", "out", "tensor"))

    def forward(self, inputs):
        import torch

        return {"signal": torch.tensor([[float(inputs["height"])]])}


class LinearGauge(Gauge, ModuleBlock):
    """level = weight * signal."""

    def __init__(self, *, start: float = 1.0) -> None:
        super().__init__()
        self.start = start

    def build_modules(self):
        import torch

        linear = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(linear.weight, self.start)
        return {"linear": linear}

    def forward(self, inputs):
        return {"level": self.modules["linear"](inputs["signal"])}


def register(registry):
    register_role("gauge", Gauge)
    register_role("spring", Source)
    register_rule(Rule("spring", "signal", "gauge", "signal"))
    registry.register("gauge/linear", "tide_gauge:LinearGauge")
    registry.register("spring/plain", "tide_gauge:Source")
'''

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tide-gauge"
version = "0.1"
[project.entry-points."wg.blocks"]
tide = "tide_gauge:register"
[tool.setuptools]
py-modules = ["tide_gauge"]
"""

USE = """
import json, sys
from wg_core import Graph
from wg_blocks.testing import check_block_contract

graph = Graph("station")
graph.add_node("gauge/linear", "gauge", config={"start": 2.0})
graph.add_node("spring/plain", "spring")
assert [str(e) for e in graph.edges] == ["spring.signal -> gauge.signal"], graph.edges
again = Graph.from_config(json.loads(json.dumps(graph.to_config())))
assert again.to_config() == graph.to_config()

import torch

graph.expose_input("spring", "height", "height")
graph.expose_output("gauge", "level", "level")
assert float(graph.run({"height": 3})["level"]) == 6.0
optimizer = torch.optim.SGD(graph.trainable_parameters(), lr=0.01)
loss = (graph.run({"height": 3}, training=True)["level"] - 9.0).pow(2).sum()
loss.backward()
optimizer.step()
# d/dw (w*3 - 9)^2 = 2*(6 - 9)*3 = -18; w = 2 + 0.01*18
weight = float(graph.state_dict()["gauge:linear.weight"])
assert abs(weight - 2.18) < 1e-6, weight
check_block_contract(graph.get_node("gauge").block, {"signal": torch.ones(1, 1)})
graph.save(sys.argv[1])
assert abs(float(Graph.load(sys.argv[1]).run({"height": 1})["level"]) - 2.18) < 1e-6
print("whole")
"""


@pytest.mark.slow
def test_a_package_brings_role_block_and_rule(tmp_path: Path) -> None:
    """01 A-17, T-4, F-47: built, wired, written, trained and saved through its entry point alone."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tide_gauge.py").write_text(PACKAGE)
    (source / "pyproject.toml").write_text(PROJECT)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USE), str(tmp_path / "saved")], capture_output=True, text=True, env=env
    )
    assert done.stdout.strip() == "whole", done.stderr

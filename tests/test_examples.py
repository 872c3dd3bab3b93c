"""The programs under examples/: each runs by itself, and none holds a level that it does not need."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = ("agents", "world", "plain_network")
LONG = ("language_model", "diffusion", "language_and_diffusion", "everything")
LEVELS = ("pipeline", "stage", "world")
NEEDED = {  # the highest level that a scenario needs
    "agents": "pipeline", "world": "world", "plain_network": "", "language_model": "", "diffusion": "",
    "language_and_diffusion": "pipeline", "everything": "world",
}  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_a_scenario_runs_by_itself(name: str, tmp_path: Path) -> None:
    """04 X-5: exits 0 without a network, says something, and draws its picture."""
    program = ROOT / f"examples/scenario_{name}.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "no_proxy": "*"}
    if "WG_HOME" not in env:
        env["WG_HOME"] = str(ROOT / ".wg")
    run = subprocess.run([sys.executable, str(program)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) >= 4
    for picture in re.findall(r"\w+\.png", ast.get_docstring(ast.parse(program.read_text())) or ""):
        from PIL import Image

        with Image.open(tmp_path / picture) as image:
            low, high = image.convert("L").getextrema()
            assert high - low > 100, "a picture with light and dark"


def test_each_scenario_says_what_it_does_without() -> None:
    """04 X-5: seven programs; every level above the one it needs is asserted to be absent."""
    found = sorted(p.stem.removeprefix("scenario_") for p in (ROOT / "examples").glob("scenario_*.py"))
    assert found == sorted((*QUICK, *LONG)) and set(NEEDED) == set(found)
    for name, level in NEEDED.items():
        text = (ROOT / f"examples/scenario_{name}.py").read_text()
        (absent,) = re.findall(r"for absent in \(([^)]*)\):\n        assert absent not in sys.modules, absent\n$", text)
        above = LEVELS[LEVELS.index(level) + 1 :] if level else LEVELS
        for module in (*(f"wg_core.levels.{a}" for a in above), "dagster", "mlflow"):
            assert f'"{module}"' in absent, (name, module)

"""Errors whose cause lies outside a structure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from blocks_for_tests import Affine

from wg_core.errors import AdapterError

WITHOUT = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")  # it is there, and takes long to load
sys.modules["transformers"] = None  # what an interpreter without the package does
from pathlib import Path
from wg_blocks.llm_local import load
from wg_core.errors import MissingExtraError
try:
    load(Path("nowhere"))
except MissingExtraError as error:
    assert isinstance(error, ImportError)
    print(error)
"""


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    """01 A-2: MissingExtraError, an ImportError, in an interpreter that lacks the package."""
    root = Path(__file__).parent.parent.parent
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=root)
    assert run.stdout.strip() == "llm/hf needs torch and transformers: pip install torch transformers", run.stderr


def test_an_adapter_needs_a_slot() -> None:
    """01 F-29, A-2: AdapterError names the block and what was looked for."""
    from wg_core.weights.lora import choose_slots

    with pytest.raises(AdapterError, match=r"lora: block 'Affine' has no slot that matches \['\*\.q'\]; there are none"):
        choose_slots(Affine(), ["*.q"], "lora")

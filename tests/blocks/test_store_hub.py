"""Models from a hub: the real client of the hub against a small server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, hub
from tiny_lm import save_tiny_lm

CODE = """
import json, sys
from wg_blocks.llm_local import CausalLM
from wg_blocks.store import ModelStore
store, ref, phases = ModelStore(), sys.argv[1], set()
try:
    store.pull(ref, lambda phase, *_: phases.add(phase))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    info = store.info(ref)
    text = CausalLM(checkpoint_ref=ref).run({"prompt": "Hi", "params": {"seed": 1, "max_new_tokens": 4}})["text"]
    print(json.dumps({"commit": info["commit"], "files": sorted(info["files"]), "text": text, "verify": store.verify(ref),
                      "phases": sorted(phases)}))
"""


def pull(ref: str, home: Path, endpoint: str) -> dict:
    """Pull in a process of its own: the client reads HF_ENDPOINT when it is imported."""
    env = {**os.environ, "WG_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE, ref], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_model_of_a_hub_is_fetched_at_its_revision_and_then_used_offline(tmp_path: Path) -> None:
    """04 B-12, 03 O-3."""
    folder = save_tiny_lm(tmp_path / "tiny")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files |= {"LICENSE": b"Permission is granted", "model.bin": b"a pickle", "evil.py": b"raise SystemExit"}
    home = tmp_path / "home"
    with hub("owner/tiny", files, "v1") as (address, asked):
        first = pull("hf:owner/tiny@v1", home, address)
        assert first["commit"] == COMMIT and first["verify"] == [] and "download" in first["phases"]
        assert "LICENSE" in first["files"] and not {"model.bin", "evil.py"} & set(first["files"])
        assert not any(path.endswith((".bin", ".py")) for path in asked)
        missing = pull("hf:owner/tiny@v9", home, address)
    assert "MissingModelError: could not fetch owner/tiny" in missing["error"]
    again = pull("hf:owner/tiny@v1", home, "http://127.0.0.1:9")
    assert again["text"] == first["text"] and "download" not in again["phases"]

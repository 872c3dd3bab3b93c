"""`wg` as a user runs it: answers, exit codes, one clear message for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from wg_core import World
from wg_core.state.lease import acquire
from wg_defs.cli import app


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a stub world, and its own home."""
    (tmp_path / "worlds").mkdir()
    World.from_template("stub", world_id="isle", seed=3).save_config(tmp_path / "worlds" / "isle.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WG_HOME", raising=False)
    monkeypatch.delenv("WG_WORLDS", raising=False)
    return tmp_path


def wg(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_run_history_show_verify(project: Path) -> None:
    """A world from nothing: story, picture, seconds and tokens for each stage; snapshots that hold."""
    first = wg("run", "isle", "--steps", "2", "--action", "a storm lands")
    assert first.exit_code == 0, first.output
    assert "skipped: block 1 (intent) is empty" in first.stdout
    assert "Story:" in first.stdout and "seconds" in first.stdout and "tokens" in first.stdout
    picture = next(line.split(maxsplit=1)[1] for line in first.stdout.splitlines() if line.startswith("Made:"))
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert "a storm lands" in wg("history", "isle").stdout
    assert [s["step"] for s in document(wg("history", "isle", "--json"))] == [0, 1]
    shown = document(wg("show", "isle@0", "--json"))
    assert shown["step"] == 0 and shown["applied"] is None and Path(shown["files"][0]["path"]).is_file()
    assert "step 1" in wg("show", "isle").stdout
    assert document(wg("verify", "isle", "--json")) == {"world": "isle", "snapshots": 2, "problems": []}


def test_run_may_say_where_the_time_goes(project: Path) -> None:
    """04 X-24: a file for pstats below `WG_HOME`, and a table of nodes."""
    file = project / ".wg/profiles/isle/000000/step.prof"
    said = wg("run", "isle", "--profile").stdout
    assert said.splitlines()[-1] == f"Profile: {file}" and file.stat().st_size > 1000
    assert "isle/development" in said and "own" in said
    (made,) = document(wg("run", "isle", "--profile", "--json"))["steps"]
    assert Path(made["profile"]["file"]).parent.name == "000001" and made["profile"]["nodes"][0]["own"] > 0
    assert wg("run", "isle", "--profile", "--profiler", "gpu").exit_code == 2


def test_run_json_is_one_document(project: Path) -> None:
    made = document(wg("run", "worlds/isle.yaml", "--steps", "2", "--json"))
    assert [s["step"] for s in made["steps"]] == [0, 1]
    assert made["steps"][1]["story"] and made["steps"][0]["story"] is None
    assert {r["role"] for r in made["steps"][1]["stages"] if r["ran"]} >= {"philosopher", "world_update"}


def test_several_worlds_step_together(project: Path) -> None:
    """Each as alone; a failure is told after what the others made, and what is for one world is refused for two."""
    for name in ("reef", "dune"):
        World.from_template("stub", world_id=name, seed=3).save_config(project / "worlds" / f"{name}.yaml")
    (alone,) = document(wg("run", "isle", "--json"))["steps"]
    both = document(wg("run", "reef", "dune", "--json"))["worlds"]
    assert [(w["world"], [s["intent"] for s in w["steps"]]) for w in both] == [
        (name, [alone["intent"]]) for name in ("reef", "dune")
    ]
    acquire(project / ".wg" / "snapshots" / "dune", "another", 60.0)
    failed = wg("run", "reef", "dune", "--steps", "2")
    assert failed.exit_code == 3 and "reef, step 1" in failed.stdout and "step 2" not in failed.stdout
    assert "1 of 2 worlds failed; published: reef step 1; dune: SnapshotConflictError" in failed.stderr
    assert document(wg("run", "reef", "isle", "--dry-run", "--json"))["worlds"][1] == {"world": "isle", "dry_run": True}
    assert "named twice" in wg("run", "reef", "worlds/reef.yaml").stderr
    assert wg("run", "reef", "isle", "--state", "state.json").exit_code == 2


def test_a_budget_and_what_was_used(project: Path) -> None:
    """01 E-9, 03 W-21: a run stops before it exceeds its budget; what a step and the world took is shown."""
    stopped = wg("run", "isle", "--steps", "3", "--budget", "calls=3,tokens=90000")
    assert stopped.exit_code == 3 and "of the budget of 3 calls are used" in stopped.stderr
    shown = document(wg("show", "isle", "--json"))
    assert shown["step"] == 0 and shown["usage"] == shown["usage_of_world"] and shown["usage"]["fake"]["calls"] == 2
    assert "all steps: 2 model calls" in wg("show", "isle").stdout


def test_run_with_a_given_state(project: Path) -> None:
    """A state from a file replaces the carried one."""
    state = World.from_yaml("worlds/isle.yaml").example_state([1, 2, 3, 4, 5])
    (project / "state.json").write_text(json.dumps(state.to_json()))
    made = document(wg("run", "isle", "--state", "state.json", "--json"))
    ran = {r["role"]: r["ran"] for r in made["steps"][0]["stages"]}
    assert not ran["author"] and ran["world_update"]
    (project / "state.json").write_text(json.dumps({"intent": {"text": "x", "mood": "y"}}))
    wrong = wg("run", "isle", "--state", "state.json")
    assert wrong.exit_code == 2 and "mood" in wrong.stderr


def test_dry_run_and_plan_write_nothing(project: Path) -> None:
    assert document(wg("run", "isle", "--dry-run", "--json")) == {"world": "isle", "dry_run": True}
    plan = wg("plan", "worlds/isle.yaml")
    assert plan.exit_code == 0 and "dispatch: maker/dispatch" in plan.stdout
    assert not (project / ".wg").exists()


@pytest.mark.parametrize(("form", "begins"), [("mermaid", "flowchart LR"), ("dot", "digraph {")])
def test_plan_draws_pictures(project: Path, form: str, begins: str) -> None:
    """02 G-42."""
    drawn = wg("plan", "worlds/isle.yaml", "--format", form)
    assert drawn.exit_code == 0 and drawn.stdout.startswith(begins) and "dispatch: maker/dispatch" in drawn.stdout
    assert document(wg("plan", "worlds/isle.yaml", "--format", form, "--json"))["picture"] == drawn.stdout
    steps = document(wg("plan", "worlds/isle.yaml", "--json"))["steps"]
    assert steps["creator"]["steps"][0]["node"] == "make"
    assert wg("plan", "worlds/isle.yaml", "--format", "picture").exit_code == 2


def test_validate_and_schema(project: Path) -> None:
    assert document(wg("validate", "worlds/isle.yaml", "--json"))["kind"] == "world"
    schema = json.loads(wg("schema", "graph").stdout)
    assert "nodes" in schema["properties"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"worl": 1}, "unknown key 'worl'"),
        ({"world_id": "../up"}, "world_id"),
        ({"schema_version": "2.0"}, "schema version 2.0"),
        ({"content": {"characters": "Mara"}}, "characters"),
    ],
)
@pytest.mark.parametrize("verb", ["validate", "run"])
def test_a_wrong_world_file(project: Path, verb: str, change: dict[str, Any], said: str) -> None:
    """One message with file and path, exit code 2, nothing written."""
    file = project / "worlds" / "isle.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    result = wg(verb, "worlds/isle.yaml")
    assert result.exit_code == 2
    assert "isle.yaml:" in result.stderr and said in result.stderr
    assert "Traceback" not in result.output
    assert not (project / ".wg").exists()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("run", "isel"), 2, "did you mean 'isle'"),
        (("run", "worlds/none.yaml"), 2, "no file 'worlds/none.yaml'"),
        (("show", "isle"), 2, "no snapshot yet"),
        (("show", "isle@x"), 2, "number of a step"),
        (("show", "isle@7"), 2, "7"),
        (("show", "isle@²"), 2, "number of a step"),
        (("show", "isle@" + "9" * 5000), 2, "number of a step"),
        (("run", "isle", "--state", "latin1.json"), 2, "state: not JSON"),
        (("import", "worlds/isle.yaml"), 2, "no readable archive"),
        (("serve", "worlds/isle.yaml", "--stage", "author", "--token-env", "NO_SUCH_TOKEN"), 2, "NO_SUCH_TOKEN"),
        (("schema", "grap"), 2, "did you mean 'graph'"),
        (("run", "isle", "--steps", "0"), 2, "steps"),
        (("run", "isle", "--budget", "calls"), 2, "write calls=N, tokens=N or cost=X"),
        (("run", "isle", "--budget", "cals=3"), 2, "did you mean 'calls'"),
    ],
)
def test_wrong_requests(project: Path, args: tuple[str, ...], code: int, said: str) -> None:
    """Design 4: exit code 2 and one message."""
    (project / "latin1.json").write_bytes(b'{"intent": {"text": "\xe9"}}')
    result = wg(*args)
    assert result.exit_code == code
    assert said in result.stderr


@pytest.mark.parametrize("below", ["", "deep/er"])
@pytest.mark.parametrize("args", [("run", "isle"), ("history", "isle"), ("gc", "isle"), ("export", "isle", "x.zip")])
def test_a_home_that_is_a_file(project: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], below: str) -> None:
    """Design 4: exit code 2, and what is wrong."""
    (project / "taken").touch()
    monkeypatch.setenv("WG_HOME", str(project / "taken" / below))
    result = wg(*args)
    assert result.exit_code == 2 and "taken' is no folder; let WG_HOME name one" in result.stderr


def test_an_error_in_json(project: Path) -> None:
    result = wg("run", "isel", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "ConfigError" and "isle" in error["message"]


def test_a_missing_model_says_which_command_fetches_it(project: Path) -> None:
    """Exit code 4; the world steps on once the model is there, so nothing may stay locked."""
    config = yaml.safe_load((project / "worlds" / "isle.yaml").read_text())
    for stage in config["execution"]["stages"].values():
        for node in stage["graph"]["nodes"]:
            if node.get("block_type") == "llm/fake":
                node["block_type"] = "llm/hf"
                node["config"] = {"checkpoint_ref": "smollm2-135m-instruct"}
    (project / "worlds" / "far.yaml").write_text(yaml.safe_dump({**config, "world_id": "far"}))
    result = wg("run", "far")
    assert result.exit_code == 4
    assert "wg models pull smollm2-135m-instruct" in result.stderr
    lease = World.from_yaml("worlds/far.yaml").store.lease("far")
    assert lease is not None and lease.owner is None


def test_a_failing_stage_is_exit_code_3(project: Path) -> None:
    """A request that the maker refuses ends the run, names the stage, and publishes nothing."""
    state = {
        "intent": {"text": "Ada draws a map."},
        "generation_config": {"requests": [{"id": "r1", "slot": "images", "maker": "map", "params": {}}]},
        "artifacts": {"images": [{"id": "0" * 64, "media_type": "image/png", "slot": "images", "uri": "blob:" + "0" * 64}]},
    }
    (project / "state.json").write_text(json.dumps(state))
    result = wg("run", "isle", "--state", "state.json")
    assert result.exit_code == 3
    assert "isle/philosopher" in result.stderr and "measure" in result.stderr
    assert wg("run", "isle").exit_code == 0


def test_models_list_and_verify(project: Path) -> None:
    rows = {row["name"]: row for row in document(wg("models", "list", "--json"))}
    assert rows["smollm2-135m-instruct"]["installed"] is False
    assert document(wg("models", "verify", "--json")) == {"problems": []}
    assert wg("models", "pull", "smolm").exit_code == 2


def test_corrupt_history_is_reported(project: Path) -> None:
    assert wg("run", "isle").exit_code == 0
    blob = next(p for p in (project / ".wg" / "snapshots" / "blobs").rglob("*") if p.is_file() and p.stat().st_size > 1000)
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    result = wg("verify", "isle")
    assert result.exit_code == 3 and blob.name in result.stderr


def test_installed_command_and_interrupt(project: Path) -> None:
    """The console script itself; `--help` names every verb."""
    script = shutil.which("wg", path=str(Path(sys.executable).parent))
    assert script is not None
    answer = subprocess.run([script, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert answer.returncode == 0
    for verb in ("run", "evolve", "history", "show", "verify", "validate", "plan", "dev", "models"):
        assert verb in answer.stdout

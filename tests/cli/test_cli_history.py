"""`wg new`, fork, diff, replay, freeze, gc, export, import and the forecast of plan, as a user runs them."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner, Result

from wg_core import World
from wg_defs.cli import app


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder with its own home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WG_HOME", raising=False)
    monkeypatch.delenv("WG_WORLDS", raising=False)
    return tmp_path


def wg(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lived(steps: int = 3) -> None:
    assert wg("new", "isle", "--param", "seed=3").exit_code == 0
    assert wg("run", "isle", "--steps", str(steps)).exit_code == 0


def test_new_writes_a_file_that_validates_and_runs(project: Path) -> None:
    """03 W-18: small, commented, with a `$schema` beside it under which the file itself is valid."""
    assert document(wg("new", "salt_marsh", "--param", "seed=7", "--json")) == {
        "world": "salt_marsh", "file": "worlds/salt_marsh.yaml",
    }  # fmt: skip
    text = (project / "worlds" / "salt_marsh.yaml").read_text()
    assert len(text.splitlines()) < 150 and text.count("\n# ") >= 6
    data = yaml.safe_load(text)
    assert data["world_id"] == "salt_marsh" and data["execution"]["seed"] == 7 and data["title"] == "Salt marsh"
    schema = json.loads((project / "worlds" / data["$schema"]).read_text())
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "worl": 1}, schema)
    assert wg("validate", "worlds/salt_marsh.yaml").exit_code == 0
    assert wg("run", "salt_marsh").exit_code == 0


def test_new_from_the_template_of_real_models(project: Path) -> None:
    """03 W-18, O-1: another template and its parameters; sound without any model here, and says which to fetch."""
    made = wg("new", "valley", "--template", "local", "--param", "title=The Valley", "--param", "seed=1")
    assert made.exit_code == 0, made.output
    assert wg("validate", "worlds/valley.yaml").exit_code == 0
    data = yaml.safe_load((project / "worlds" / "valley.yaml").read_text())
    assert data["title"] == "The Valley"
    assert document(wg("plan", "worlds/valley.yaml", "--json"))["forecast"]["nodes"][0]["counted_by"] == "words"
    missing = wg("run", "valley")
    assert missing.exit_code == 4 and "wg models pull" in missing.stderr


def test_a_cycle_of_ones_own_is_what_the_page_shows(project: Path) -> None:
    """03 W-15: the stages that a run goes through, here and on Dagster's page, are those of the file's cycle."""
    from wg_defs.worlds import ROLES, world_file

    assert wg("new", "isle", "--param", "seed=3").exit_code == 0
    assert world_file("isle").roles == ROLES
    file = project / "worlds" / "isle.yaml"
    data = yaml.safe_load(file.read_text())
    data["execution"]["cycle"] = [*ROLES[3:], *ROLES[:3]]
    file.write_text(yaml.safe_dump(data))
    assert world_file("isle").roles == (*ROLES[3:], *ROLES[:3])
    made = document(wg("run", "isle", "--json"))["steps"][0]
    assert [s["role"] for s in made["stages"]] == [*ROLES[3:], *ROLES[:3]] and all(s["ran"] for s in made["stages"])
    assert document(wg("replay", "isle", "--json"))["same"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("isle",), "there is a world 'isle' already"),
        (("../up",), "bad world id"),
        (("b", "--template", "stubb"), "did you mean 'stub'"),
        (("b", "--param", "sed=1"), "did you mean 'seed'"),
        (("b", "--param", "seed"), "name=value"),
        (("b", "--param", "seed=[1"), "--param seed"),
    ],
)
def test_new_refuses(project: Path, args: tuple[str, ...], said: str) -> None:
    assert wg("new", "isle").exit_code == 0
    result = wg("new", *args)
    assert result.exit_code == 2 and said in result.stderr
    assert [p.name for p in (project / "worlds").glob("*.yaml")] == ["isle.yaml"]


def test_fork_keeps_the_file_s_form_and_goes_on(project: Path) -> None:
    """03 C-7: the fork's file is the origin's under a new id, with its comments; its history begins with that step."""
    lived()
    made = document(wg("fork", "isle@1", "other", "--json"))
    assert made == {"world": "other", "file": "worlds/other.yaml", "origin": "isle@1"}
    old, new = ((project / "worlds" / f"{n}.yaml").read_text().splitlines() for n in ("isle", "other"))
    assert [(a, b) for a, b in zip(old, new, strict=True) if a != b] == [("world_id: isle", "world_id: other")]
    assert document(wg("run", "other", "--json"))["steps"][0]["step"] == 2
    assert [s["step"] for s in document(wg("history", "other", "--json"))] == [1, 2]
    assert wg("verify", "other").exit_code == 0 and wg("verify", "isle").exit_code == 0
    again = wg("fork", "isle@1", "other")
    assert again.exit_code == 2 and "already" in again.stderr
    missing = wg("fork", "isle@9", "third")
    assert missing.exit_code == 2 and "no step 9" in missing.stderr and not (project / "worlds" / "third.yaml").exists()


def test_a_fork_for_which_there_is_no_room_leaves_nothing(project: Path) -> None:
    """C-7: a file that cannot be written to its end is none."""
    document(wg("new", "isle", "--json"))
    document(wg("run", "isle", "--json"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        result = wg("fork", "isle", "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 3 and "too large" in result.stderr
    assert not (project / "worlds/other.yaml").exists() and not (project / ".wg/snapshots/other").exists()
    assert wg("fork", "isle", "other").exit_code == 0


def test_a_fork_of_a_world_elsewhere_stands_alone(project: Path) -> None:
    """A file from another folder is written out whole, since its references would not hold here."""
    (project / "far").mkdir()
    World.from_template("stub", world_id="isle", seed=3).save_config(project / "far" / "isle.yaml")
    assert wg("run", "far/isle.yaml").exit_code == 0
    assert wg("fork", "far/isle.yaml", "other").exit_code == 0
    assert World.from_yaml("worlds/other.yaml").config_hash == World.from_yaml("far/isle.yaml").config_hash
    assert document(wg("run", "other", "--json"))["steps"][0]["step"] == 1


def test_diff_and_replay(project: Path) -> None:
    """RFC 6902 in JSON, a line for each change otherwise; a replay compares ids and asks no model."""
    lived()
    patch = document(wg("diff", "isle@1", "isle@2", "--json"))
    assert any(p["path"].startswith("/content/") for p in patch)
    assert "/carried/intent/text" in wg("diff", "isle@1", "isle").stdout
    assert wg("diff", "isle", "isle").stdout.strip() == "no difference"
    done = document(wg("replay", "isle@2", "--json"))
    assert done["same"] and done["recorded"] == done["replayed"] and done["calls_replayed"] == 4
    assert "no model was asked" in wg("replay", "isle").stdout
    file = project / "worlds" / "isle.yaml"
    text = file.read_text()
    file.write_text(text.replace("size: 64", "size: 128"))
    other = wg("replay", "isle")
    assert other.exit_code == 3 and "another snapshot" in other.stderr and "carried" in other.stderr
    file.write_text(text.replace("Draw a map for", "Please draw"))
    error = wg("replay", "isle", "--json")
    assert error.exit_code == 3 and json.loads(error.stdout)["error"]["kind"] == "ReplayError"


def test_freeze_and_link(project: Path) -> None:
    """04 X-49: freeze, link as the answer says, and the new world's Author reads it."""
    lived()
    made = document(wg("freeze", "isle@2", "book", "--json"))
    assert made["folder"] == "worlds/book" and wg("validate", "worlds/book/end_world.yaml").exit_code == 0
    assert wg("new", "reader").exit_code == 0
    file = project / "worlds" / "reader.yaml"
    data = yaml.safe_load(file.read_text())
    data["content"]["links"] = [made["link"], {**made["link"], "target_id": "lost"}]
    file.write_text(yaml.safe_dump(data))
    warned = wg("validate", "worlds/reader.yaml")
    assert warned.exit_code == 0 and "'lost' is not found" in warned.stderr and "'book'" not in warned.stderr
    assert wg("run", "reader", "--steps", "2").exit_code == 0
    reader = World.from_yaml(file)
    asked = reader.calls(reader.history()[1])["author"][0]["request"]["context"]
    assert any(item["source"].startswith("book/") for item in asked)
    assert wg("freeze", "isle", "book").exit_code == 2
    assert wg("run", "worlds/book/end_world.yaml").exit_code == 2
    assert wg("plan", "worlds/book/end_world.yaml").exit_code == 2
    blob = next(p for p in (project / "worlds" / "book" / "blobs").rglob("*") if p.is_file() and p.stat().st_size > 300)
    blob.write_bytes(b"x")
    assert wg("validate", "worlds/book/end_world.yaml").exit_code == 3


def test_gc_export_import(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """03 C-7."""
    lived(4)
    kept = document(wg("gc", "isle", "--json"))["removed"]
    assert kept["blobs"] == 0 and kept["kept_blobs"] > 10
    would = document(wg("gc", "isle", "--max-snapshots", "2", "--grace", "0", "--dry-run", "--json"))["removed"]
    assert would["steps"] == [0, 1] and len(document(wg("history", "isle", "--json"))) == 4
    done = document(wg("gc", "isle", "--max-snapshots", "2", "--grace", "0", "--json"))["removed"]
    assert done == would and [s["step"] for s in document(wg("history", "isle", "--json"))] == [2, 3]
    assert wg("verify", "isle").exit_code == 0
    assert wg("export", "isle", "isle.zip").exit_code == 0
    assert wg("export", "isle", "isle.zip").exit_code == 2
    (project / "new").mkdir()
    monkeypatch.chdir(project / "new")
    assert document(wg("import", "../isle.zip", "--json")) == {"world": "isle", "file": "worlds/isle.yaml"}
    assert wg("verify", "isle").exit_code == 0 and wg("replay", "isle").exit_code == 0
    assert wg("run", "isle").exit_code == 0
    assert wg("import", "../isle.zip").exit_code == 2
    assert wg("import", "../none.zip").exit_code == 2


def test_help_names_every_verb(project: Path) -> None:
    shown = wg("--help").stdout
    for verb in ("new", "fork", "diff", "replay", "freeze", "gc", "export", "import"):
        assert f" {verb} " in shown
        assert wg(verb, "--help").exit_code == 0
        assert "--json" in wg(verb, "--help").stdout


def test_plan_forecasts_calls_and_tokens(project: Path) -> None:
    """Design, `wg plan`: what a step will ask of models, known before it is paid for, touching nothing."""
    assert wg("new", "isle", "--param", "seed=3").exit_code == 0
    forecast = document(wg("plan", "worlds/isle.yaml", "--json"))["forecast"]
    assert [n["path"].split("/")[0] for n in forecast["nodes"]] == ["philosopher", "author", "development", "architect"]
    assert [n["due"] for n in forecast["nodes"]] == [False, False, True, True]
    assert (forecast["full_step"]["calls"], forecast["next_step"]["calls"]) == (4, 2)
    assert not (project / ".wg").exists()
    shown = wg("plan", "worlds/isle.yaml").stdout
    assert "a full step: 4 calls" in shown and "the next step: 2 calls" in shown and "1 per item" in shown
    first = document(wg("run", "isle", "--json"))["steps"][0]
    assert sum(u["calls"] for s in first["stages"] for u in s["usage"].values()) == forecast["next_step"]["calls"]
    forecast = document(wg("plan", "worlds/isle.yaml", "--json"))["forecast"]
    second = document(wg("run", "isle", "--json"))["steps"][0]
    used = [u for s in second["stages"] for u in s["usage"].values()]
    assert forecast["next_step"] == forecast["full_step"]
    assert sum(u["calls"] for u in used) == forecast["full_step"]["calls"]
    assert sum(u["prompt_tokens"] for u in used) < forecast["full_step"]["prompt_tokens"]
    assert sum(u["completion_tokens"] for u in used) < forecast["full_step"]["completion_tokens"]

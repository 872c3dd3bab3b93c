"""What Dagster is shown, before any run."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from stub_project import Project, stub_config, write_world

from resources.values import JsonValues
from wg_core.errors import ConfigError
from wg_defs.build import build
from wg_defs.instance import settings
from wg_defs.partitions import key_of, step_of
from wg_defs.worlds import ROLES, read_worlds, world_file

ROOT = Path(__file__).parents[2]


def test_definitions_are_light(project: Project) -> None:  # proves 05 K-6
    code = (
        "import sys, wg_defs.definitions as d; d.defs.resolve_job_def('tide__evolve');"
        "print([m for m in ('torch', 'transformers', 'mlflow', 'numpy', 'PIL') if m in sys.modules])"
    )
    env = {**os.environ, "WG_WORLDS": str(project.worlds), "WG_HOME": str(project.root / ".wg")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=project.root, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_broken_file_stands_beside_the_others(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    (project.worlds / "bad.yaml").write_text("kind: world\nworld_id: bad\nexecution: {a: 1\n", encoding="utf-8")
    (project.worlds / "no-id.yaml").write_text("kind: world\nexecution: {}\n", encoding="utf-8")
    write_world(project.worlds, stub_config("zeta", project.root / "snapshots"))
    twin = project.worlds / "twin.yaml"
    twin.write_text((project.worlds / "tide.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with caplog.at_level(logging.WARNING, "wg_defs"):
        definitions = project.definitions()
    specs = {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}
    assert {"tide/author", "tide/snapshot", "zeta/author", "broken_worlds/bad", "broken_worlds/no_id"} <= set(specs)
    assert "bad.yaml:4" in str(specs["broken_worlds/bad"].description)
    assert "already the world of" in str(specs["broken_worlds/twin"].description)
    assert sum("left out a broken world file" in r.message for r in caplog.records) == 3
    assert project.step("000000", world_id="zeta").success


def test_a_file_that_reads_but_does_not_build_fails_in_begin(project: Project) -> None:
    config = stub_config("tide", project.root / "snapshots")
    config["execution"]["stages"]["author"]["graph"]["nodes"][0]["block_type"] = "no/such_block"
    write_world(project.worlds, config)
    from stub_project import failure

    step, said = failure(project.step("000000"))
    assert step == "begin" and "no/such_block" in said and "tide.yaml" in said


def test_end_worlds_and_other_kinds_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("kind: world\nworld_id: old\ncontent: {description: A book.}\n", "utf-8")
    (tmp_path / "graph.yaml").write_text("kind: graph\nid: g\nnodes: []\n", "utf-8")
    assert read_worlds([tmp_path]) == ([], [])
    with pytest.raises(ConfigError, match="no world 'old'"):
        world_file("old", [tmp_path])


def test_assets_of_a_world(project: Project) -> None:
    """05 mapping: the stages and the snapshot of a step, and the chain of training, which is of no step."""
    specs = {"/".join(s.key.path[1:]): s for s in project.definitions().resolve_all_asset_specs()}
    steps, training = [*ROLES, "snapshot"], ["training_examples", "lora/adapter", "lora/evaluation", "lora/world"]
    assert set(specs) == {*steps, *training}
    for names in (steps, training):
        for name, before in zip(names[1:], names[:-1], strict=True):
            assert [d.asset_key.path for d in specs[name].deps] == [["tide", *before.split("/")]]
    for name, spec in specs.items():
        assert spec.group_name == ("tide" if name in steps else "tide__training") and spec.code_version
        assert isinstance(spec.partitions_def, dg.DynamicPartitionsDefinition) == (name in steps)


def test_a_lora_world_has_steps_and_no_training(project: Project) -> None:
    """03 L-2: the file of a LoRA world is a world on the page like any other; what it learned is trained on its base."""
    base = {"world": {"ref": "tide.yaml"}}
    config = {"kind": "world", "schema_version": "1.0", "world_id": "calm", "title": "Calm"}
    config["execution"] = {"base": base, "adapters": {"sets": {"default": {"rank": 4}}}}
    write_world(project.worlds, config)
    of_lora = [s.key.path for s in project.definitions().resolve_all_asset_specs() if s.key.path[0] == "calm"]
    assert sorted(path[1] for path in of_lora) == sorted([*ROLES, "snapshot"])


def test_the_code_version_follows_the_execution(project: Project) -> None:
    def version() -> str:
        return world_file("tide", [project.worlds]).code_version

    first = version()
    config = stub_config("tide", project.root / "snapshots")
    config["content"]["description"] = "Another sea."
    write_world(project.worlds, config)
    assert version() == first
    config["execution"]["seed"] = 9
    write_world(project.worlds, config)
    assert version() != first


@pytest.mark.parametrize("world_id", ["import", "_", "config", "type", "a" * 64, "broken"])
def test_any_legal_id_is_a_legal_name_for_dagster(tmp_path: Path, world_id: str) -> None:
    write_world(tmp_path, stub_config(world_id, tmp_path / "snapshots"))
    definitions = build([tmp_path], root=tmp_path / ".wg", mlflow=False)
    dg.Definitions.validate_loadable(definitions)


def test_broken_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text("- a list\n", encoding="utf-8")
    (tmp_path / "a" / "taken.yaml").write_text("kind: world\nworld_id: broken_worlds\nexecution: {}\n", "utf-8")
    definitions = build([tmp_path / "a", tmp_path / "b"], root=tmp_path / ".wg", mlflow=False)
    keys = {spec.key.path[-1] for spec in definitions.resolve_all_asset_specs()}
    assert keys == {"same", "same_2", "taken"}


def test_keys() -> None:
    assert step_of(key_of(42)) == 42
    for key in ("42", "0000042", "00004x", "٠٠٠٠٤٢"):
        with pytest.raises(ConfigError, match="six digits"):
            step_of(key)


def test_an_instance_below_wg_home(tmp_path: Path) -> None:
    code = "from wg_defs.instance import open_instance as o; print(o().root_directory, o().telemetry_enabled)"
    env = {k: v for k, v in os.environ.items() if not k.startswith("DAGSTER")} | {"WG_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "home" / "dagster" / "artifacts"), "False"], done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_instance_file_says_what_the_code_says() -> None:  # proves 05 K-12
    assert yaml.safe_load((ROOT / "dagster.yaml").read_text("utf-8")) == settings(".wg/dagster")


def test_values_are_json_or_refused(tmp_path: Path) -> None:  # proves 05 K-8
    values = JsonValues(root=str(tmp_path))

    @dg.asset
    def fine() -> dict:
        return {"text": "ä", "n": [1, 2.5, None]}

    @dg.asset
    def live() -> object:
        return object()

    @dg.asset
    def reader(fine: dict) -> dict:
        return fine

    with dg.DagsterInstance.ephemeral() as instance:
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        made = dg.materialize([fine, reader], resources={"io_manager": values}, instance=instance, run_config=quiet)
        assert made.output_for_node("reader") == {"text": "ä", "n": [1, 2.5, None]}
        with pytest.raises(TypeError, match="blob store"):
            dg.materialize([live], resources={"io_manager": values}, instance=instance, run_config=quiet)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json"}

"""One step through Dagster, on the stub world."""

import json
from pathlib import Path

import dagster as dg
import pytest
from stub_project import QUIET, Project, developed_by, failing_creator, failure, materialized, stub_config, write_world

RAN = {
    (): "",
    (1,): "",
    (1, 2): "",
    (1, 2, 3): "philosopher author world_update",
    (1, 2, 3, 4): "author world_update",
    (1, 2, 3, 4, 5): "world_update",
}
LATER = "development architect creator"


@pytest.mark.parametrize("given", RAN, ids=lambda g: "".join(map(str, g)) or "nothing")
def test_table_of_given_states(project: Project, given: tuple[int, ...]) -> None:  # proves 03 W-13, 05 K-2
    state = project.state(given)
    result = project.step("000000", initial_state=state)
    assert result.success
    made = materialized(result)
    ran = [role for role in made if role != "snapshot" and made[role].metadata["ran"].value]
    assert ran == f"{RAN[given]} {LATER}".split()
    for role in set(made) - set(ran) - {"snapshot"}:
        assert made[role].tags["wg/skipped"] == "true"
        assert made[role].metadata["reason"].value
    checks = {e.asset_key.path[-1]: e.passed for e in result.get_asset_check_evaluations()}
    assert checks == dict.fromkeys(set(made) - {"snapshot"}, True)
    head = project.world().store.head("tide")
    assert head is not None
    assert [r.role for r in head.stages if r.ran] == ran
    if given in {(1,), (1, 2)}:
        assert "dropped" in str(made["world_update"].metadata["reason"].value)


def test_a_skipped_stage_keeps_the_version_of_the_state(project: Project) -> None:  # proves 05 K-2
    made = materialized(project.step("000000"))
    versions = {role: m.tags["dagster/data_version"] for role, m in made.items()}
    assert versions["philosopher"] == versions["author"] == versions["world_update"]
    assert len({versions[role] for role in ("author", "development", "architect", "creator")}) == 4


def test_the_snapshot_is_the_version_of_its_asset(project: Project) -> None:  # proves 05 K-1, K-10
    first, second = (materialized(project.step(key))["snapshot"] for key in ("000000", "000001"))
    head = project.world().store.head("tide")
    assert head is not None and head.step == 1
    assert second.tags["dagster/data_version"] == head.id
    assert second.metadata["parent_version"].value == first.tags["dagster/data_version"]
    assert second.metadata["story"].value == head.applied["outcome"]["narrative"]
    for name in ("seconds", "model_calls", "prompt_tokens", "completion_tokens", "tokens"):
        assert isinstance(second.metadata[name].value, int | float), name
    thumbnail = str(second.metadata["thumbnail"].value)
    assert thumbnail.startswith("![](data:image/webp;base64,") and len(thumbnail) < 1000  # longer texts fold
    assert 1000 < len(str(second.metadata["picture"].value)) < 30_000
    file = Path(str(second.metadata["picture_file"].value))
    assert file.is_file() and file.name == second.metadata["picture_id"].value
    assert project.instance.get_dynamic_partitions("tide__steps") == ["000000", "000001", "000002"]


def test_missing_step_before(project: Project) -> None:  # proves 05 K-1
    project.step("000000")
    step, said = failure(project.step("000003"))
    assert step == "begin"
    assert "step 2, which is not there" in said and "partition 000001" in said and "wg evolve tide --steps 3" in said
    assert project.world().store.head("tide").step == 0


def test_a_key_that_is_no_step(project: Project) -> None:
    step, said = failure(project.step("tomorrow"))
    assert step == "begin" and "six digits" in said


def test_published_step_again(project: Project) -> None:  # proves 05 K-5
    project.world().step()
    project.step("000001", action="a storm lands", seed=5)
    project.world().step()
    history = [s.id for s in project.world().store.history("tide")]
    again = project.step("000001")
    assert again.success
    made = materialized(again)["snapshot"]
    assert made.tags["dagster/data_version"] == history[1]
    assert "nothing changed" in str(made.metadata["published"].value)
    assert project.step("000001", action="a storm lands", seed=5).success
    step, said = failure(project.step("000001", action="a calm"))
    assert step == "begin" and "another action" in said and "wg fork tide@0" in said
    assert failure(project.step("000002", seed=1))[0] == "begin"
    assert [s.id for s in project.world().store.history("tide")] == history


def test_published_step_with_another_result(project: Project) -> None:  # proves 05 K-5
    project.step("000000", seed=1)
    published = project.world().store.head("tide")
    config = stub_config("tide", project.root / "snapshots")
    nodes = config["execution"]["stages"]["development"]["graph"]["nodes"]
    prompt = next(node for node in nodes if node["node_id"] == "prompt")
    prompt["config"]["template"] = "Something else entirely. {{ action }}"
    write_world(project.worlds, config)
    step, said = failure(project.step("000000"))
    assert step == "snapshot" and "another result" in said and "wg new" in said
    assert project.world().store.head("tide").id == published.id


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"seed": -1}, "seed: -1"),
        ({"seed": "seven"}, "seed"),
        ({"actoin": "x"}, "actoin"),
        ({"action": "x" * 20_001}, "20001 characters"),
        ({"initial_state": "/no/such/file.json"}, "No such file"),
        ({"initial_state": {"intent": {"txt": "x"}}}, "txt"),
        ({"initial_state": {"intention": {}}}, "intention"),
        ({"dry_run": "perhaps"}, "dry_run"),
        ({"budget": {"calls": -1}}, "budget.calls"),
        ({"budget": {"cals": 1}}, "cals"),
    ],
)
def test_wrong_launch_config_is_refused_before_a_run(
    project: Project, config: dict[str, object], says: str
) -> None:  # K-9
    with pytest.raises(dg.DagsterError) as caught:
        project.step("000000", **config)
    assert says in f"{caught.value} {caught.value.__cause__}"
    assert project.instance.get_runs() == []
    assert project.world().store.head("tide") is None


def test_state_from_a_file(project: Project, tmp_path: Path) -> None:  # proves 05 K-9
    state = project.state([1, 2, 3])
    file = tmp_path / "state.json"
    file.write_text(json.dumps(state), encoding="utf-8")
    assert project.step("000000", initial_state=str(file), seed=3, action="a calm").success
    head = project.world().store.head("tide")
    assert (head.given, head.seed, head.action) == (state, 3, "a calm")


def test_a_budget_stops_the_step_and_costs_are_numbers(project: Project) -> None:  # proves 05 K-9, K-10, 01 E-9
    config = stub_config("tide", project.root / "snapshots")
    words = {"backend": "api", "provider": "fake", "model_id": "m", "prices": {"call": 0.5}}
    config["execution"]["models"]["text"] = {"block_type": "llm/api", "config": words}
    write_world(project.worlds, config)
    step, said = failure(project.step("000000", seed=4, budget={"calls": 1, "cost": 9.5}))
    assert step == "architect" and "1 of the budget of 1 calls are used; raise the budget" in said
    assert project.world().store.head("tide") is None
    made = materialized(project.step("000000", seed=4, budget={"calls": 2}))
    assert made["development"].metadata["cost"].value == 0.5 and made["snapshot"].metadata["cost"].value == 1.0
    assert made["snapshot"].metadata["model_calls"].value == 2


def test_dry_run_makes_nothing(project: Project) -> None:  # proves 05 K-9
    result = project.step("000000", dry_run=True)
    assert result.success and materialized(result) == {}
    observed = [e for e in result.all_events if e.event_type_value == "ASSET_OBSERVATION"]
    assert len(observed) == 1
    assert project.world().store.head("tide") is None


def test_a_broken_contract_stops_the_step(project: Project) -> None:  # proves 05 K-3
    config = stub_config("tide", project.root / "snapshots")
    config = developed_by(config, {"block_type": "text/template", "config": {"template": " "}})
    write_world(project.worlds, config)
    result = project.step("000000")
    step, said = failure(result)
    assert step == "development" and "left intent empty" in said
    checks = {e.asset_key.path[-1]: e.passed for e in result.get_asset_check_evaluations()}
    assert checks["development"] is False and checks["world_update"] is True
    assert "architect" not in checks and "development" not in materialized(result)
    assert project.world().store.head("tide") is None


def test_the_step_after_a_failed_one_goes_through(project: Project) -> None:  # the lease is given back
    good = stub_config("tide", project.root / "snapshots")
    write_world(project.worlds, failing_creator(good))
    step, said = failure(project.step("000000"))
    assert step == "creator" and "the brush broke" in said
    write_world(project.worlds, good)
    assert project.step("000000").success


def test_a_world_that_another_run_is_writing(project: Project) -> None:  # proves 05 K-4
    store = project.world().store
    epoch = store.acquire("tide", "another")
    step, said = failure(project.step("000000"))
    assert step == "begin" and "is being written by 'another'" in said
    assert store.release("tide", "another", epoch)
    assert project.step("000000").success


def test_chain_check(project: Project) -> None:  # proves 05 K-3
    def chain() -> dg.AssetCheckEvaluation:
        key = dg.AssetCheckKey(dg.AssetKey(["tide", "snapshot"]), "chain")
        alone = dg.define_asset_job("chain", selection=dg.AssetSelection.checks(key))
        defs = dg.Definitions.merge(project.definitions(), dg.Definitions(jobs=[alone]))
        result = defs.resolve_job_def("chain").execute_in_process(
            instance=project.instance, run_config={"loggers": QUIET}
        )
        return result.get_asset_check_evaluations()[0]

    for key in ("000000", "000001"):
        project.step(key)
    assert chain().passed
    picture = project.world().store.history("tide")[0].carried["artifacts"]["images"][0]["id"]
    file = project.world().store.blobs.path(picture)
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found = chain()
    assert not found.passed and picture in str(found.metadata["problems"].value)


def test_reexecution_goes_on_at_the_failed_stage(project: Project) -> None:  # proves 05 K-8
    good = stub_config("tide", project.root / "snapshots")
    write_world(project.worlds, failing_creator(good))
    failed = project.step("000000", seed=4)
    assert failure(failed)[0] == "creator"
    write_world(project.worlds, good)
    with dg.execute_job(
        dg.build_reconstructable_job("stub_project", "job_of", (str(project.root),)),
        instance=project.instance,
        tags={"dagster/partition": "000000"},
        reexecution_options=dg.ReexecutionOptions.from_failure(failed.run_id, project.instance),
    ) as again:
        assert again.success
        started = {e.step_key.rpartition(".")[2] for e in again.all_events if e.event_type_value == "STEP_START"}
    assert started == {"creator", "snapshot"}
    assert project.world().store.head("tide").seed == 4

"""Equal results wherever the parts run: one pipeline, and one world, here, mixed, and all elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from far import ROOT, Far, build, far_registry, one, started, stop

from wg_core import ConfigError, Graph, ModelPool, Pipeline, Stage, ValidationError, World
from wg_core.assembly.contract import contract_hash
from wg_core.assembly.models import ContractEntry
from wg_core.errors import MissingInputError, RemoteError, UnexpectedInputError
from wg_core.execution.blobs import MemoryBlobs
from wg_core.execution.plan import Placeholder
from wg_core.levels.remote import Remote
from wg_core.state.store import SnapshotStore

LOOPING = {
    "kind": "graph",
    "id": "loop",
    "nodes": [{"node_id": "n", "block_type": "far/where"}],
    "edges": [{"source_node": "n", "source_port": "y", "target_node": "n", "target_port": "x", "carry": True}],
    "exposed_inputs": [{"name": "x", "node_id": "n", "port_name": "x"}],
    "exposed_outputs": [{"name": "y", "node_id": "n", "port_name": "y"}, {"name": "seen", "node_id": "n", "port_name": "seen"}],
}  # fmt: skip
GRAPHS: dict[str, dict[str, Any]] = {
    "first": one("far/affine", "g1", offset=0.5),
    "second": LOOPING,
    "third": one("far/same", "g3"),
}
SHAPE = {
    "kind": "pipeline",
    "id": "p",
    "edges": [
        {"source_node": "first", "source_port": "y", "target_node": "second", "target_port": "x"},
        {"source_node": "second", "source_port": "y", "target_node": "third", "target_port": "x"},
    ],
    "exposed_inputs": [
        {"name": "x", "node_id": "first", "port_name": "x"}, {"name": "more", "node_id": "third", "port_name": "more"},
    ],
    "exposed_outputs": [
        {"name": "y", "node_id": "third", "port_name": "y"}, {"name": "seen", "node_id": "second", "port_name": "seen"},
        {"name": "also", "node_id": "third", "port_name": "also"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Far]]:
    with ThreadPoolExecutor(3) as threads:
        running = dict(zip(GRAPHS, threads.map(Far, GRAPHS.values()), strict=True))
    yield running
    for far in running.values():
        stop(far.process)


def pipeline(servers: dict[str, Far], away: tuple[str, ...] = (), **endpoint: Any) -> Pipeline:
    """The pipeline with the graphs of these nodes elsewhere."""
    nodes = [{"node_id": n, **(servers[n].entry(**endpoint) if n in away else {"config": GRAPHS[n]})} for n in GRAPHS]
    return build({**SHAPE, "nodes": nodes})


PLACES = [(), ("second",), ("first", "third"), tuple(GRAPHS)]


@pytest.mark.parametrize("away", PLACES[1:], ids="-".join)
def test_a_pipeline_gives_the_same_wherever_its_graphs_run(servers: dict[str, Far], away: tuple[str, ...]) -> None:
    """proves 02 M-1, acceptance 4: results, seeds, paths, loops, use of models and configuration hash."""
    options = {"seed": 7, "num_loop_steps": 3, "extra": {"step": 4}, "per_node": {"second": {"seed": 11}}}
    here, mixed = pipeline(servers), pipeline(servers, away)
    inputs = {"x": 1, "more": {"wave": [b"x" * 40_000, None, float("inf")]}}
    expected = here.run(inputs, **options)
    assert expected["seen"]["path"] == "p/second/n" and expected["seen"]["iteration"] == 2
    assert mixed.run(inputs, **options) == expected
    assert mixed.config_hash == here.config_hash
    assert mixed.contract_hash() == here.contract_hash()
    assert [e["key"] for e in mixed.get_output_spec()] == [e["key"] for e in here.get_output_spec()]
    assert "also" not in mixed.run({"x": 1})


def test_tensors_and_images_come_back_bit_for_bit(servers: dict[str, Far]) -> None:
    """proves 02 M-4 over a real socket: dtype, shape and bytes, inline and in parts."""
    import numpy as np
    import torch

    image = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    given = {
        "latent": torch.randn(1, 4, 32, 32).to(torch.bfloat16),
        "mask": [torch.tensor(True)],
        "image": image,
        "none": None,
    }
    back = pipeline(servers, tuple(GRAPHS)).run({"x": 1, "more": given}, seed=1)["also"]
    assert back["latent"].dtype == torch.bfloat16 and torch.equal(back["latent"], given["latent"])
    assert back["mask"][0].shape == () and back["mask"][0].dtype == torch.bool and back["none"] is None
    assert back["image"].dtype == image.dtype and np.array_equal(back["image"], image)


def test_no_gradient_and_no_parameter_comes_from_elsewhere(servers: dict[str, Far]) -> None:
    """proves 02 M-6: values that need a gradient are cut off at the border."""
    import torch

    level = pipeline(servers, ("third",))
    back = level.run({"x": 1, "more": torch.ones(2, requires_grad=True)}, training=True)["also"]
    assert not back.requires_grad and level.trainable_parameters() == []


def test_its_file_names_endpoint_and_contract(servers: dict[str, Far], tmp_path: Path) -> None:
    """proves 02 M-2, S-15, P-3: endpoints and contracts survive the round trip, and the shorthand is read."""
    mixed = pipeline(servers, ("second",), retries=1)
    config = mixed.to_config()
    assert config["nodes"][1]["endpoint"] == {"url": servers["second"].url, "retries": 1, "backoff_s": 0.02}
    path = mixed.save_config(tmp_path / "p.yaml")
    again = Pipeline.from_yaml(path, registry=far_registry(), pool=ModelPool())
    assert again.to_config() == config
    assert again.run({"x": 1}, seed=1) == mixed.run({"x": 1}, seed=1)
    entry = servers["third"].entry()
    short = Pipeline("p")
    short.add_graph(
        Remote.from_config(
            {"id": "r", "endpoint_url": servers["third"].url, "contract": entry["contract"]}, registry=far_registry()
        )
    )
    assert short.run({"x": 3})["y"] == 3


def test_a_dry_run_makes_no_call(servers: dict[str, Far]) -> None:
    """proves 02 acceptance 7: placeholders by contract, although nobody listens at this address."""
    entry = servers["second"].entry(url="http://127.0.0.1:9")
    nodes = [{"node_id": n, "config": g} if n != "second" else {"node_id": n, **entry} for n, g in GRAPHS.items()]
    level = build({**SHAPE, "nodes": nodes})
    assert level.dry_run()["seen"] == Placeholder(("dict",), "second.seen")
    assert level.trainable_parameters() == [] and level.validate(deep=True).is_valid


def test_inputs_are_checked_before_anything_is_sent(servers: dict[str, Far]) -> None:
    remote = pipeline(servers, ("first",)).nodes["first"].child
    with pytest.raises(UnexpectedInputError, match="has no input 'z'"):
        remote.run({"z": 1})
    with pytest.raises(MissingInputError, match="needs 'x'"):
        remote.run({})
    assert remote.run({"x": 1}) == {"y": 1.5}


def test_a_node_without_contract_or_with_a_wrong_one(servers: dict[str, Far]) -> None:
    """proves 02 G-26 REMOTE_CONTRACT: missing, and different once it was fetched on request."""
    entry = servers["first"].entry()
    with pytest.raises(ConfigError, match="REMOTE_CONTRACT"):
        build({"kind": "pipeline", "nodes": [{"node_id": "a", "endpoint": entry["endpoint"]}]})
    bare = Remote("a", endpoint=servers["first"].url, registry=far_registry())
    with pytest.raises(ValidationError, match="needs a stored contract"):
        bare.run({})
    contract = {**entry["contract"], "inputs": [{"key": "x", "types": "text"}, {"key": "more", "types": "any"}]}
    wrong = Remote("a", endpoint=entry["endpoint"], contract=contract, registry=far_registry())
    assert wrong.validate().is_valid
    with pytest.raises(RemoteError, match=r"409 contract_mismatch.*out of date") as caught:
        wrong.run({"x": "a", "more": 1})
    assert (caught.value.code, caught.value.status) == ("contract_mismatch", 409)
    wrong.fetch_contract()
    (issue,) = wrong.validate(strict=False).errors
    assert issue.code == "REMOTE_CONTRACT" and "the server has no 'more'" in issue.message
    right = Remote("a", endpoint=entry["endpoint"], contract=entry["contract"], registry=far_registry())
    right.fetch_contract()
    assert right.validate().is_valid


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"config": one("far/same"), "endpoint_url": "http://a"}, "either a graph as its config, or an endpoint"),
        ({}, "either a graph as its config, or an endpoint"),
        ({"endpoint_url": "http://a", "endpoint": {"url": "http://b"}}, "give one of them"),
        ({"endpoint": {"url": "http://a", "url_env": "B"}}, "either url or url_env"),
        ({"endpoint": {"url": "http://a", "token": "x"}}, "token"),
        ({"config": one("far/same"), "contract": {"inputs": [], "outputs": []}}, "add its endpoint"),
        ({"endpoint_url": "http://a", "contract": {"inputs": [{"key": "x", "types": "txt"}], "outputs": []}}, "unknown port type 'txt'"),
    ],
)  # fmt: skip
def test_entries_that_mean_nothing(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"kind": "pipeline", "nodes": [{"node_id": "a", **node}]})


def test_references_are_carried_both_ways() -> None:
    """proves 02 M-4, 03 W-19: bytes that a reference names are sent to the side that lacks them."""
    with Far(one("far/picture")) as maker, Far(one("far/read")) as reader:
        config = {
            "kind": "pipeline",
            "nodes": [{"node_id": "make", **maker.entry()}, {"node_id": "read", **reader.entry()}],
            "edges": [{"source_node": "make", "source_port": "ref", "target_node": "read", "target_port": "ref"}],
            "exposed_outputs": [
                {"name": "text", "node_id": "read", "port_name": "text"}, {"name": "ref", "node_id": "make", "port_name": "ref"},
            ],
        }  # fmt: skip
        blobs = MemoryBlobs()
        made = build(config).run({"make:text": "a shore"}, blobs=blobs)
    assert made["text"] == "a shore"
    assert blobs.get(made["ref"]["uri"][5:]) == b"a shore"


def test_a_stage_takes_remote_pipelines() -> None:
    """proves 02 M-2: the same mechanism serves stage children."""
    graph = {
        **one("far/same", "same"),
        "exposed_inputs": [{"name": "x", "node_id": "n", "port_name": "x"}],
        "exposed_outputs": [{"name": "y", "node_id": "n", "port_name": "y"}],
    }
    head = {
        "id": "s",
        "reads": ["intent"],
        "writes": ["outcome"],
        "inputs": {"x": "intent.text"},
        "outputs": {"outcome.narrative": "y"},
    }
    with Far(graph) as far:
        away = Stage.from_config({**head, "nodes": [{"node_id": "same", **far.entry()}]}, registry=far_registry())
        state = {"intent": {"text": "calm"}}
        assert away.run({"state": state})["state"].read("outcome.narrative") == "calm"
    near = Stage.from_config({**head, "graph": graph}, registry=far_registry())
    assert near.contract_hash() == away.contract_hash()
    assert Stage.from_config(away.to_config(), registry=far_registry()).to_config() == away.to_config()


# ---- worlds ------------------------------------------------------------------------------------------------------------

ROLES = ("philosopher", "author", "development", "architect", "creator")


def world_file(folder: Path, **execution: Any) -> Path:
    """The stub world as a file, as `wg new` would write it."""
    config = yaml.safe_load((ROOT / "wg_blocks" / "templates" / "stub_world.yaml").read_text())
    config["world_id"] = "isle"
    config["execution"]["seed"] = 5
    config["execution"]["stages"].update(execution)
    path = folder / "isle.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def serve_stage(path: Path, role: str) -> tuple[Any, str]:
    return started(
        ["-m", "wg_defs.cli", "serve", str(path), "--stage", role, "--port", "0", "--json"],
        WG_HOME=str(path.parent / role),
    )


def stage_entry(path: Path, role: str, url: str) -> dict[str, Any]:
    from wg_blocks.serve import served_contract
    from wg_core.assembly.contract import contract_words

    stage = World.from_yaml(path).stages[role]
    return {
        "endpoint": {"url": url, "retries": 1, "backoff_s": 0.02},
        "contract": contract_words(served_contract(stage)),
    }


def snapshots(path: Path, home: Path, steps: int = 3) -> list[str]:
    world = World.from_yaml(path)
    world.store = SnapshotStore(home)
    return [world.step(action="a storm lands" if i == 1 else None).id for i in range(steps)]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, tuple[Any, str]]]]:
    """Each stage of the stub world in a process of its own, started as a user does."""
    path = world_file(tmp_path_factory.mktemp("served"))
    with ThreadPoolExecutor(2) as threads:
        running = dict(zip(ROLES, threads.map(lambda role: serve_stage(path, role), ROLES), strict=True))
    yield path, running
    for process, _ in running.values():
        stop(process)


@pytest.mark.parametrize(
    "away",
    [
        pytest.param(("creator",), id="creator", marks=pytest.mark.slow),
        pytest.param(("philosopher", "architect"), id="two", marks=pytest.mark.slow),
        pytest.param(ROLES, id="all"),
    ],
)
def test_a_world_is_the_same_wherever_its_stages_run(
    stages: tuple[Path, dict[str, tuple[Any, str]]], away: tuple[str, ...], tmp_path: Path
) -> None:
    """proves 03 W-19, 02 M-1: equal snapshot ids after three steps, and every blob that they name is here."""
    path, running = stages
    expected = snapshots(path, tmp_path / "here")
    there = world_file(tmp_path, **{role: stage_entry(path, role, running[role][1]) for role in away})
    assert snapshots(there, tmp_path / "mixed") == expected
    world = World.from_yaml(there)
    world.store = SnapshotStore(tmp_path / "mixed")
    assert list(world.store.verify("isle")) == []
    here = SnapshotStore(tmp_path / "here").head("isle")
    mixed = world.store.head("isle")
    assert here is not None and mixed is not None
    assert [(r.role, r.ran, r.reason, r.usage, r.read, r.wrote) for r in mixed.stages] == [
        (r.role, r.ran, r.reason, r.usage, r.read, r.wrote) for r in here.stages
    ]
    assert any(r.usage for r in mixed.stages)
    for items in mixed.carried["artifacts"].values():
        for item in items:
            assert world.store.blobs.get(item["id"]).startswith(b"\x89PNG")
    assert world.dry_run().keys() == set(ROLES)
    assert World.from_config(world.to_config()).config_hash == world.config_hash == World.from_yaml(path).config_hash


def test_a_server_of_another_configuration_is_refused(
    stages: tuple[Path, dict[str, tuple[Any, str]]], tmp_path: Path
) -> None:
    """A snapshot says which configuration made it; so the server must run that one."""
    path, running = stages
    entry = stage_entry(path, "author", running["author"][1])
    entry["contract"]["config_hash"] = "0" * 64
    world = World.from_yaml(world_file(tmp_path, author=entry))
    world.store = SnapshotStore(tmp_path / "s")
    state = world.example_state([1, 2, 3])
    with pytest.raises(RemoteError, match=r"isle/author at 127\.0\.0\.1:\d+: it answers 409 config_mismatch"):
        world.step(state=state)
    assert world.history() == []


def test_requests_in_another_order_are_another_contract(stages: tuple[Path, dict[str, tuple[Any, str]]]) -> None:
    """A model writes in the order of the schema, so a file that was sorted is refused, not run with other results."""
    path, running = stages
    contract = ContractEntry.model_validate(stage_entry(path, "creator", running["creator"][1])["contract"])
    turned = ContractEntry.model_validate(json.loads(json.dumps(contract.model_dump(by_alias=True), sort_keys=True)))
    assert turned == contract and contract_hash(turned) != contract_hash(contract)


def test_a_stage_entry_must_be_a_stage(servers: dict[str, Far], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="serve a stage, or put the endpoint on a node below"):
        World.from_yaml(world_file(tmp_path, author=servers["first"].entry()))


def test_the_printed_contract_is_the_one_that_callers_store(stages: tuple[Path, dict[str, tuple[Any, str]]]) -> None:
    from typer.testing import CliRunner

    from wg_defs.cli import app

    path, running = stages
    for extra, read in (((), yaml.safe_load), (("--json",), json.loads)):
        shown = CliRunner().invoke(app, ["serve", str(path), "--stage", "creator", "--contract", *extra])
        assert shown.exit_code == 0, shown.output
        assert read(shown.stdout)["contract"] == stage_entry(path, "creator", running["creator"][1])["contract"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "--stage ROLE"), (["--stage", "autor"], "did you mean 'author'"), (["--stage", "author", "--host", "0.0.0.0"], "--token-env")],
)  # fmt: skip
def test_serve_says_what_is_wrong(tmp_path: Path, arguments: list[str], says: str) -> None:
    from typer.testing import CliRunner

    from wg_defs.cli import app

    answer = CliRunner().invoke(app, ["serve", str(world_file(tmp_path)), *arguments], env={"WG_HOME": str(tmp_path)})
    assert answer.exit_code == 2 and says in answer.output.replace("\n", " ")


def test_graphs_are_the_same_with_another_inside() -> None:
    """proves 02 G-23: the contract hash is of the ports alone, in any order, whatever is inside."""
    hashes = {build(one("far/affine", offset=n)).contract_hash() for n in (1, 2)}
    assert len(hashes) == 1
    assert build(one("far/same")).contract_hash() not in hashes
    turned = Graph.from_config(
        {**LOOPING, "exposed_outputs": LOOPING["exposed_outputs"][::-1]}, registry=far_registry(), pool=ModelPool()
    )
    assert turned.contract_hash() == build(LOOPING).contract_hash()

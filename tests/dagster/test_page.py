"""The real page: `dagster dev` on a project folder, driven through GraphQL and a browser."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stub_project import stub_config, write_world

from wg_core import World

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = pytest.mark.slow


@dataclass
class Page:
    """A running page."""

    url: str
    root: Path

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                data = json.load(answer)
        except urllib.error.HTTPError as error:  # how a PythonError in the answer arrives
            data = json.load(error)
        assert "errors" not in data, data
        (value,) = data["data"].values()
        return value

    def launch(self, job: str, config: dict[str, Any], partition: str | None = None) -> Any:
        tags = [{"key": "dagster/partition", "value": partition}] if partition else []
        return self.ask(
            """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename
              ... on LaunchRunSuccess { run { runId } } ... on PythonError { message causes { message } }
              ... on RunConfigValidationInvalid { errors { message } } } }""",
            p={
                "selector": {
                    "repositoryLocationName": "wg", "repositoryName": "__repository__", "jobName": job,
                },
                "runConfigData": config,
                "executionMetadata": {"tags": tags},
            },
        )  # fmt: skip

    def run(self, job: str, config: dict[str, Any], partition: str | None = None) -> str:
        launched = self.launch(job, config, partition)
        assert launched["__typename"] == "LaunchRunSuccess", launched
        run_id = launched["run"]["runId"]
        query = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        return self.wait(lambda: self.ask(query, id=run_id)["status"], {"SUCCESS", "FAILURE", "CANCELED"})

    def wait(self, look: Any, ends: set[str], seconds: float = 180) -> str:
        until = time.monotonic() + seconds
        while (found := look()) not in ends:
            assert time.monotonic() < until, f"still {found}"
            time.sleep(0.5)
        return found

    def runs(self) -> list[dict[str, Any]]:
        query = "{ runsOrError { ... on Runs { results { runId status startTime endTime tags { key value } } } } }"
        return self.ask(query)["results"]

    def keys(self) -> list[str]:
        query = """{ assetNodes(assetKeys: [{path: ["tide", "snapshot"]}]) { partitionKeys } }"""
        return self.ask(query)[0]["partitionKeys"]

    def world(self) -> World:
        return World.from_yaml(self.root / "worlds" / "tide.yaml")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """`wg dev` in a folder like a fresh clone, with one world that has no step yet and one broken file."""
    root = tmp_path_factory.mktemp("project")
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, root / name)
    write_world(root / "worlds", stub_config("tide", root / ".wg" / "snapshots"))
    (root / "worlds" / "bad.yaml").write_text("kind: world\nworld_id: [\n", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DAGSTER", "WG_", "MLFLOW"))}
    command = [sys.executable, "-m", "wg_defs.dev", str(port)]
    with (root / "dev.log").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT)
    started = Page(f"http://127.0.0.1:{port}", root)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                if started.ask("{ version }"):
                    break
            except OSError:
                pass
            assert process.poll() is None and time.monotonic() < until, (root / "dev.log").read_text()
            time.sleep(0.5)
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def step(**config: Any) -> dict[str, Any]:
    return {"ops": {"tide__step": {"config": config}}}


def test_1_the_next_step_is_ready_to_launch(page: Page) -> None:
    assert page.keys() == ["000000"]
    assert page.run("tide__evolve", step(action="a storm lands", seed=7), "000000") == "SUCCESS"
    head = page.world().store.head("tide")
    assert (head.step, head.action, head.seed) == (0, "a storm lands", 7)
    assert page.keys() == ["000000", "000001"]


def test_2_wrong_config_starts_nothing(page: Page) -> None:  # proves 05 K-9
    before = len(page.runs())
    for config in (step(actoin="x"), step(seed=-1), step(initial_state="/no/such/file.json")):
        answer = page.launch("tide__evolve", config, "000001")
        assert answer["__typename"] in {"RunConfigValidationInvalid", "PythonError"}, answer
        assert any(word in json.dumps(answer) for word in ("actoin", "seed: -1", "No such file")), answer
    assert len(page.runs()) == before


def test_3_a_backfill_of_five_runs_in_order(page: Page) -> None:  # proves 05 K-2, K-4
    assert page.run("tide__add_steps", {"ops": {"tide__add_keys": {"config": {"count": 5}}}}) == "SUCCESS"
    wanted = [f"{i:06d}" for i in range(1, 6)]
    assert page.keys() == ["000000", *wanted]
    launched = page.ask(
        """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) { __typename
          ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }""",
        p={
            "assetSelection": [{"path": ["tide", role]} for role in (
                "philosopher", "author", "world_update", "development", "architect", "creator", "snapshot")],
            "partitionNames": wanted,
        },
    )  # fmt: skip
    assert launched["__typename"] == "LaunchBackfillSuccess", launched
    query = """query($id: String!) {
      partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"""
    ends = {"COMPLETED_SUCCESS", "COMPLETED_FAILED", "COMPLETED", "FAILED", "CANCELED"}
    status = page.wait(lambda: page.ask(query, id=launched["backfillId"])["status"], ends)
    assert status == "COMPLETED_SUCCESS", (page.root / "dev.log").read_text()[-4000:]
    assert [s.step for s in page.world().store.history("tide")] == list(range(6))
    tagged = [(dict((t["key"], t["value"]) for t in run["tags"]), run) for run in page.runs()]
    filled = sorted((t["dagster/partition"], r) for t, r in tagged if "dagster/backfill" in t)
    assert [key for key, _ in filled] == wanted
    for (_, earlier), (_, later) in itertools.pairwise(filled):
        assert earlier["endTime"] <= later["startTime"]


def test_4_steps_launched_together_wait_for_each_other(page: Page) -> None:  # proves 05 K-4
    assert page.run("tide__add_steps", {"ops": {"tide__add_keys": {"config": {"count": 2}}}}) == "SUCCESS"
    launched = [page.launch("tide__evolve", step(), key)["run"]["runId"] for key in ("000006", "000007")]
    query = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
    for run_id in launched:
        status = page.wait(lambda id=run_id: page.ask(query, id=id)["status"], {"SUCCESS", "FAILURE"})
        assert status == "SUCCESS"
    assert page.world().store.steps("tide") == list(range(8))


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium in the PATH")
def test_5_a_person_makes_a_step_and_sees_story_and_picture(page: Page) -> None:  # proves 05 K-10, K-17
    playwright = pytest.importorskip("playwright.sync_api")
    shots = Path(os.environ.get("WG_SCREENSHOTS", page.root))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1500, "height": 1100})
        tab.set_default_timeout(30_000)
        tab.goto(f"{page.url}/locations/wg/asset-groups/tide")
        tab.get_by_text("Materialize all").first.click()
        tab.get_by_text("materialize 7 assets").first.wait_for()  # a step, and no training
        tab.get_by_role("button", name="Missing", exact=True).click()
        tab.get_by_text("1 partition", exact=True).first.wait_for()
        tab.screenshot(path=shots / "1-launch.png")
        tab.get_by_role("button", name="Launch 1 run").click()
        page.wait(lambda: str(page.world().store.head("tide").step), {"8"})
        page.wait(lambda: next(r["status"] for r in page.runs()), {"SUCCESS", "FAILURE"})
        head = page.world().store.head("tide")
        tab.goto(f"{page.url}/assets/tide/snapshot?view=partitions&partition=000008")
        tab.get_by_text(head.applied["outcome"]["narrative"][:60]).first.wait_for()
        image = tab.locator("img[src^='data:image/webp']").first
        image.wait_for()
        assert image.evaluate("i => i.complete && i.naturalWidth") >= 16
        tab.screenshot(path=shots / "2-snapshot.png")
        tab.get_by_text("[Show Markdown]").first.click()
        large = tab.locator("img[src^='data:image/jpeg']").first
        large.wait_for()
        assert large.evaluate("i => i.complete && i.naturalWidth") >= 64
        tab.wait_for_timeout(500)
        tab.screenshot(path=shots / "3-picture.png")
        tab.goto(f"{page.url}/assets/tide/snapshot?view=overview")
        tab.get_by_text("Plots").click()
        tab.get_by_text("tokens").first.wait_for()
        tab.wait_for_timeout(1000)
        tab.screenshot(path=shots / "3-plots.png")
        tab.goto(f"{page.url}/assets/tide/author?view=partitions&partition=000000")
        tab.get_by_text("is empty").first.wait_for()
        tab.screenshot(path=shots / "4-skipped.png")
        tab.goto(f"{page.url}/assets/broken_worlds/bad")
        tab.get_by_text("bad.yaml:").first.wait_for()
        tab.screenshot(path=shots / "5-broken.png")
        browser.close()


def test_6_it_all_lies_below_the_project(page: Page) -> None:  # proves 05 K-12
    assert {p.name for p in page.root.iterdir()} <= {".wg", "worlds", "dagster.yaml", "workspace.yaml", "dev.log"} | {
        p.name for p in page.root.glob("*.png")
    }
    assert (page.root / ".wg" / "dagster" / "storage").is_dir()
    assert not list(page.root.rglob("*.pkl")) and not list(page.root.rglob("*.pickle"))

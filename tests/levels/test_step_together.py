"""Several worlds step together: each makes what it makes alone, and what they want of one model is one batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from wg_core import Block, Graph, Port, Stage, World, step_together
from wg_core.errors import BudgetExceededError, ConfigError, JointStepError, NodeExecutionError, SnapshotConflictError
from wg_core.execution.context import Event, current_context, drained
from wg_core.state.lease import acquire, read_lease, release


class Oracle(Block):
    """Answers prompts; `rounds` tells how many were answered at once, `places` where each answer was taken."""

    ports = (Port("prompt", "in", "text"), Port("text", "out", "text"))

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[int] = []
        self.places: list[tuple[str, str]] = []

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return drained(self._asking(inputs, alone=True))

    def batch_forward(self, inputs: dict[str, Any]) -> Generator[Any, Any, dict[str, Any]]:
        return self._asking(inputs, alone=False)

    def _asking(self, inputs: dict[str, Any], *, alone: bool) -> Generator[Any, Any, dict[str, Any]]:
        before = current_context()
        request = {"prompt": inputs["prompt"], "seed": before.node_seed() % 97}

        def make() -> Generator[Any, Any, Mapping[str, Any]]:
            with before.hold("oracle", tokens=9) as held:
                said = self.answer_batch([request])[0] if alone else (yield request)
                if isinstance(said, Exception):
                    raise said
                context = current_context()
                self.places.append((before.path, context.path))
                context.add_usage("oracle", prompt_tokens=len(inputs["prompt"]), completion_tokens=2, held=held)
                context.emit("model_call", model="oracle", request=request, answer=said)
            return {"answer": said}

        got = yield from before.ask_in_pieces("oracle", request, make)
        return {"text": got["answer"]}

    def answer_batch(self, requests: Sequence[Any]) -> list[Any]:
        self.rounds.append(len(requests))
        if any(r["prompt"] == "burn" for r in requests):
            raise MemoryError("the oracle burnt down")
        return [
            ValueError("the oracle is mute") if r["prompt"] == "mute" else f"{r['prompt']} {r['seed']}" for r in requests
        ]


def world(world_id: str, oracle: Oracle, root: Path, *, second: str = "", **more: Any) -> World:
    """A world that asks the oracle in two stages; `second` is what it asks in the second one."""

    def stage(name: str, prompt: str, output: str, **contract: Any) -> Stage:
        graph = Graph(name)
        graph.add_node(oracle, "ask", defaults={"prompt": prompt})
        graph.expose_output("ask", "text", "text")
        made = Stage(name, outputs={output: "text"}, **contract)
        made.add_pipeline(graph)
        return made

    first = stage("tell", f"{world_id} tells", "intent.text", reads=[], writes=["intent"])
    then = stage("judge", second or f"{world_id} judges", "outcome.narrative", reads=["intent"], writes=["outcome"])
    made = World(world_id, {"tell": first, "judge": then}, seed=7, **more)
    made.set_cycle(["tell", "judge"])
    made.set_storage(root)
    return made


def free(made: World) -> bool:
    """Whether another owner may write the world."""
    folder = made.store.root / made.world_id
    epoch = acquire(folder, "another", 5.0)
    return release(folder, "another", epoch)


def test_a_world_makes_what_it_makes_alone(tmp_path: Path) -> None:
    """03 W-13, C-10: a stub world, its fork and one with a cycle of its own come to the very same snapshots."""

    def worlds(root: Path) -> list[World]:
        marsh = World.from_template("stub", world_id="marsh", seed=3)
        marsh.set_storage(root)
        marsh.step()
        return [marsh, world("isle", Oracle(), root), marsh.fork("other")]

    alone, joint = worlds(tmp_path / "alone"), worlds(tmp_path / "joint")
    for action in ("a storm lands", None):
        expected = [one.step(action=action).id for one in alone]
        assert [s.id for s in step_together(joint, action=action)] == expected
    assert [one.verify() for one in joint] == [[], [], []]
    assert joint[2].replay().same and current_context().path == "" and step_together([]) == []


def test_calls_at_the_same_time_are_one_batch_and_each_world_keeps_its_own(tmp_path: Path) -> None:
    """03 L-3: requests are joined; places, usage, hooks and recorded calls are those of each world, and it replays."""
    oracle, lone = Oracle(), Oracle()
    names = ("north", "south", "west")
    joint = [world(name, oracle, tmp_path / "joint") for name in names]
    alone = [world(name, lone, tmp_path / "alone") for name in names]
    heard: dict[str, list[Event]] = {name: [] for name in names}
    everything: list[Event] = []
    for one in joint:
        one.hooks.append(heard[one.world_id].append)
    snapshots = step_together(joint, seed=11, hooks=[everything.append])
    assert oracle.rounds == [3, 3] and lone.rounds == []
    for made, lonely in zip(snapshots, [one.step(seed=11) for one in alone], strict=True):
        assert made.id == lonely.id and [s.usage for s in made.stages] == [s.usage for s in lonely.stages]
    assert all(before == after for before, after in oracle.places) and len(oracle.places) == 6
    for one, made in zip(joint, snapshots, strict=True):
        calls = [e for e in heard[one.world_id] if e.kind == "model_call"]
        assert [e.data["answer"].split()[0] for e in calls] == [one.world_id] * 2
        assert {e.path.split("/")[0] for e in heard[one.world_id]} == {one.world_id}
        assert [c["request"]["prompt"] for role in one.cycle for c in one.calls(made)[role]] == [
            f"{one.world_id} tells", f"{one.world_id} judges"
        ]  # fmt: skip
        done = one.replay()
        assert done.same and done.calls == 2 and done.unused_calls == 0
        assert free(one)
    assert len(everything) == sum(map(len, heard.values())) and oracle.rounds == [3, 3]


@pytest.mark.parametrize(("asked", "why", "joined"), [("mute", "is mute", 3), ("burn", "burnt down", 2)])
def test_a_world_that_fails_stops_no_other(tmp_path: Path, asked: str, why: str, joined: int) -> None:
    """03 C-6, C-10: it gives its lease back and goes on from its journal; a named error has what the others published.

    A batch that fails as a whole fails for all that were in it, here for two worlds that share an oracle.
    """
    shared, own = Oracle(), Oracle()
    healthy = shared if asked == "mute" else own
    worlds = [world("sick", shared, tmp_path, second=asked), world("hale", healthy, tmp_path), world("kin", shared, tmp_path)]
    with pytest.raises(JointStepError, match=f"sick: NodeExecutionError.*{why}") as caught:
        step_together(worlds)
    failed = ["sick"] if asked == "mute" else ["sick", "kin"]
    assert list(caught.value.errors) == failed and isinstance(caught.value.__cause__, NodeExecutionError)
    assert sorted(caught.value.snapshots) == sorted({"sick", "hale", "kin"} - {*failed})
    assert caught.value.snapshots["hale"].id == worlds[1].history()[0].id and shared.rounds == [joined] * 2
    for one in worlds:
        assert free(one) and len(one.history()) == (one.world_id not in failed)
    events: list[Event] = []
    with pytest.raises(NodeExecutionError):
        worlds[0].step(hooks=[events.append])
    assert [e.data["resumed"] for e in events if e.kind == "stage_end"] == [True]


def test_a_world_that_cannot_begin_stops_no_other(tmp_path: Path) -> None:
    """03 C-6: another owner holds the lease of one."""
    oracle = Oracle()
    worlds = [world("held", oracle, tmp_path), world("open", oracle, tmp_path)]
    acquire(tmp_path / "held", "another", 60.0)
    with pytest.raises(JointStepError, match="1 of 2 worlds failed; published: open step 0; held: Snapshot") as caught:
        step_together(worlds)
    assert isinstance(caught.value.errors["held"], SnapshotConflictError) and free(worlds[1])
    lease = read_lease(tmp_path / "held")
    assert lease is not None and lease.owner == "another"


def test_what_stops_the_program_gives_every_lease_back(tmp_path: Path) -> None:
    oracle = Oracle()
    worlds = [world("first", oracle, tmp_path), world("second", oracle, tmp_path)]

    def interrupt(event: Event) -> None:
        if event.path == "second/judge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step_together(worlds, hooks=[interrupt])
    assert [free(one) for one in worlds] == [True, True] and current_context().path == ""


def test_budgets_are_those_of_each_world_and_one_of_all(tmp_path: Path) -> None:
    """01 E-9: limits of a file hold for its world alone, those of the call for all worlds together."""
    oracle = Oracle()
    poor = world("poor", oracle, tmp_path / "own", execution={"budget": {"calls": 1}})
    with pytest.raises(JointStepError) as own:
        step_together([world("rich", oracle, tmp_path / "own"), poor])
    assert isinstance(own.value.errors["poor"], BudgetExceededError) and list(own.value.snapshots) == ["rich"]
    assert oracle.rounds == [2, 1]
    both = [world("one", oracle, tmp_path / "all"), world("two", oracle, tmp_path / "all")]
    with pytest.raises(JointStepError, match="3 of the budget of 3 calls") as shared:
        step_together(both, budget={"calls": 3})
    assert list(shared.value.snapshots) == ["one"]


def test_worlds_that_cannot_step_together_are_refused(tmp_path: Path) -> None:
    one = world("one", Oracle(), tmp_path)
    with pytest.raises(ConfigError, match="'one' is given 2 times"):
        step_together([one, one])
    with pytest.raises(ConfigError, match="one by one"):
        step_together([one], training=True)
    assert one.history() == []

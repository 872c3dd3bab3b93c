"""The ledger and budgets of worlds behind an API: what a step may cost, and that nothing is lost when it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer, chat, status
from test_api_world import behind, world

from wg_core import Block, Graph, World
from wg_core.errors import ApiResponseError, BudgetExceededError
from wg_core.execution.budget import Budget

PRICES = {"prompt": 1000.0, "completion": 3000.0}
COST = (11 * 1000 + 7 * 3000) / 1e6  # of one answer of the server


def limited(folder: Path, url: str, budget: dict[str, Any] | None = None, **config: Any) -> World:
    made = world(folder, behind(url, prices=PRICES, **config))
    if budget is not None:
        made._execution["budget"] = budget
        made = World.from_yaml_text(json.dumps(made.to_config()))
        made.set_storage(folder)
    return made


def test_the_ledger_has_calls_tokens_and_cost(tmp_path: Path, server: ApiServer) -> None:
    """01 E-9, 03 W-21: per stage in its record, per step and per world."""
    far = limited(tmp_path, server.url)
    first, second = far.evolve(2, seed=3)
    for record in (r for r in second.stages if r.usage):
        row = record.usage["openai/tale-1"]
        assert row["cost"] == pytest.approx(COST * row["calls"]) and row["prompt_tokens"] == 11 * row["calls"]
    total = far.usage()["openai/tale-1"]
    assert total["calls"] == len(server.seen) and total["cost"] == pytest.approx(COST * len(server.seen))
    assert far.usage(1) == second.usage() and first.usage() != second.usage()


@pytest.mark.parametrize(("name", "limit"), [("calls", 2), ("tokens", 300), ("cost", COST * 2.5)])
def test_a_step_stops_before_it_exceeds_its_budget(name: str, limit: float, tmp_path: Path, server: ApiServer) -> None:
    """01 E-9, 03 W-21: refused before the call; what was published stays, what a stage finished is not paid twice."""
    free = limited(tmp_path / "free", server.url)
    wanted = [snapshot.id for snapshot in free.evolve(2, seed=3)]
    needed = int(free.usage(1)["openai/tale-1"]["calls"])
    before = limited(tmp_path / "held", server.url)
    before.step(seed=3)
    server.seen.clear()
    far = limited(tmp_path / "held", server.url, {name: limit})
    assert far.config_hash == before.config_hash and far.to_config()["execution"]["budget"] == {name: limit}
    with pytest.raises(
        BudgetExceededError, match=rf"far/\w+/.*openai/tale-1: this call may take .* {name}.*raise the budget"
    ):
        far.step(seed=3)
    made = len(server.seen)
    assert made == (2 if name == "calls" else 0) < needed
    assert [s.id for s in far.history()] == wanted[:1] and far.store.verify("far") == []
    assert before.step(seed=3).id == wanted[1]
    assert len(server.seen) == needed  # stages that had come to their end were taken over


def test_a_budget_of_a_run_holds_for_all_its_steps(tmp_path: Path, server: ApiServer) -> None:
    """01 E-9: and what was published before it was used up stays."""
    far = limited(tmp_path, server.url)
    far.step(seed=3)
    first = len(server.seen)
    budget = Budget({"calls": first + 1})
    with pytest.raises(BudgetExceededError):
        list(far.evolve(5, seed=4, budget=budget))
    assert budget.spent["calls"] == first + 1 and len(far.history()) >= 1 and far.store.verify("far") == []


def graph_of(block: Block) -> Graph:
    graph = Graph("g")
    graph.add_node(block, "llm")
    graph.expose_input("llm", "prompt", name="prompt")
    graph.expose_output("llm", "text", name="text")
    return graph


def test_the_estimate_counts_what_is_read_and_the_room_for_the_answer(
    api: Callable[..., Block], server: ApiServer
) -> None:
    """01 E-9: nothing is sent; streams are held to it as well; repairs are calls of their own."""
    graph, asked = graph_of(api()), {"prompt": "word " * 30}
    with pytest.raises(BudgetExceededError, match="may take 296 tokens, and 0 of the budget of 295"):
        graph.run(asked, budget={"tokens": 295})
    with pytest.raises(BudgetExceededError):
        list(graph.stream(asked, budget={"tokens": 295}))
    assert server.seen == []
    assert graph.run(asked, budget={"tokens": 296})["text"] and len(server.seen) == 1


def test_a_price_that_is_not_known_is_not_free(api: Callable[..., Block], server: ApiServer) -> None:
    """01 E-9: a budget of cost needs prices; the offline provider costs nothing."""
    with pytest.raises(BudgetExceededError, match=r"what a call costs is not known.*give prices"):
        graph_of(api()).run({"prompt": "x"}, budget={"cost": 100})
    assert server.seen == []
    fake = api(provider="fake", endpoint_url=None, api_key_env=None)
    assert graph_of(fake).run({"prompt": "x"}, budget={"cost": 0})["text"]


def test_calls_that_fail_count(api: Callable[..., Block], server: ApiServer) -> None:
    """01 E-9: so that a run that always fails comes to an end."""
    budget = Budget({"calls": 2})
    for _ in range(2):
        server.replies.append(status(400))
        with pytest.raises(Exception, match="answers 400") as caught:
            graph_of(api()).run({"prompt": "x"}, budget=budget)
        assert isinstance(caught.value.__cause__, ApiResponseError)
    with pytest.raises(BudgetExceededError, match="2 of the budget of 2 calls"):
        graph_of(api()).run({"prompt": "x"}, budget=budget)
    assert len(server.seen) == 2


def test_a_server_that_does_not_count_is_held_to_the_budget(api: Callable[..., Block], server: ApiServer) -> None:
    """03 W-21: what it took is estimated then, in the ledger too; what is not known is not free."""
    server.replies.extend([{"json": {"choices": chat("word " * 300)["json"]["choices"]}}] * 9)
    budget, graph = Budget({"tokens": 2000}), Graph("g")
    graph.add_node(api(), "llm")
    graph.expose_input("llm", "prompt", name="prompt")
    graph.expose_input("llm", "params", name="params")
    graph.expose_output("llm", "usage", name="usage")
    with pytest.raises(BudgetExceededError, match="of the budget of 2000 tokens are used"):
        for _ in range(9):
            usage = graph.run({"prompt": "hello " * 60, "params": {"max_new_tokens": 500}}, budget=budget)["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (90, 400)
    assert len(server.seen) == 3 and budget.spent["tokens"] == 3 * 490
    server.replies.clear()
    server.replies.append({"json": {"data": [{"index": 0, "embedding": [1.0]}]}})
    assert api("embedding/api").run({"input": "one two three"})["usage"]["prompt_tokens"] == 4

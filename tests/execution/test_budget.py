"""Budgets: a call that would exceed one is refused before it is made, whoever asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from wg_blocks.agent_scripted import ScriptedAgent
from wg_blocks.llm_fake import FakeLLM
from wg_core import Graph, Pipeline
from wg_core.errors import BudgetExceededError, ConfigError
from wg_core.execution.budget import Budget
from wg_core.execution.context import RunOptions


def three() -> Graph:
    """Three language model nodes in a row."""
    graph = Graph("g")
    for name in "abc":
        graph.add_node(FakeLLM(script=["one two three"]), name, defaults={"params": {"max_new_tokens": 10}})
    graph.expose_input("a", "prompt", name="prompt")
    graph.add_edge("a", "text", "b", "prompt")
    graph.add_edge("b", "text", "c", "prompt")
    graph.expose_output("c", "text", name="text")
    return graph


def run(budget: Any) -> Any:
    pipeline = Pipeline("p")
    pipeline.add_graph(three(), "first")
    return pipeline.run({"prompt": "x y"}, budget=budget)


def test_calls_tokens_and_cost_are_limited_in_all_levels_of_a_run() -> None:
    """01 E-9, 03 W-21: held at the estimate, settled at what it took; the error names place and limit, as itself."""
    with pytest.raises(
        BudgetExceededError, match=r"p/first/c: fake: this call may take 1 calls, and 2 of the budget of 2"
    ):
        run({"calls": 2})
    assert run({"calls": 3})
    # a: at most 2 + 10, took 5; b: at most 3 + 10, took 6 (11 in all); c: at most 3 + 10
    with pytest.raises(BudgetExceededError, match=r"p/first/c: .* may take 13 tokens, and 11 of the budget of 23"):
        run({"tokens": 23})
    assert run({"tokens": 24})
    with pytest.raises(BudgetExceededError, match=r"p/first/a: .*raise the budget, or ask for less"):
        run({"tokens": 11})


def test_a_budget_is_one_for_the_runs_that_it_is_given_to() -> None:
    """01 E-9."""
    budget = Budget({"calls": 4})
    run(budget)
    with pytest.raises(BudgetExceededError):
        run(budget)
    assert budget.spent["calls"] == 4
    inner = Budget({"tokens": 100}, within=budget)
    with pytest.raises(BudgetExceededError, match="4 of the budget of 4 calls"):
        inner.hold("x", 1)
    assert inner.spent["calls"] == 0


def test_what_is_held_counts_until_it_is_settled() -> None:
    """01 E-9: calls at the same time cannot exceed it together; a refused one leaves nothing held."""
    budget = Budget({"tokens": 100})
    with ThreadPoolExecutor(8) as threads:
        held = [f for f in [threads.submit(budget.hold, "x", 30) for _ in range(8)] if f.exception() is None]
    assert len(held) == 3
    for hold in held:
        hold.result().settle({"calls": 1, "prompt_tokens": 2, "completion_tokens": 3})
        hold.result().settle({"calls": 9})
    assert budget.spent == {"calls": 3, "tokens": 15, "cost": 0.0}
    budget.hold("x", 85).drop()
    assert budget.spent["tokens"] == 15


@pytest.mark.parametrize(
    "wrong", [{"cals": 1}, {"calls": 1.5}, {"tokens": -1}, {"cost": float("inf")}, {"calls": True}]
)
def test_budgets_that_are_none(wrong: dict[str, Any]) -> None:
    """01 E-9: named before anything runs."""
    with pytest.raises(ConfigError, match="budget"):
        RunOptions(budget=wrong)


def test_no_agent_goes_on_past_a_budget() -> None:
    """01 E-9, F-41: what fails in a tool is told to the agent; a budget that is used up ends the run."""
    graph = Graph("g")
    asks = {"tool_calls": [{"tool_id": "ask", "arguments": {"prompt": "x"}}]}
    graph.add_node(ScriptedAgent(script=[asks, asks, "never said"]), "bot")
    graph.add_node(FakeLLM(), "ask")
    graph.add_tool("ask", "ask")
    graph.expose_input("bot", "context", "prompt")
    graph.expose_output("bot", "response", "response")
    assert graph.run({"prompt": ""}, budget={"calls": 2})["response"] == "never said"
    graph.nodes["bot"].child.reset_session()
    with pytest.raises(BudgetExceededError, match="1 of the budget of 1 calls"):
        graph.run({"prompt": ""}, budget={"calls": 1})

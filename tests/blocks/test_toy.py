"""The small blocks with real numbers: sampling against closed forms, toy networks that learn, tokens, tools, a script."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wg_blocks.agent_scripted import ScriptedAgent
from wg_blocks.sampling import DDIM, ClassifierFree, Euler, Heun, Noise
from wg_blocks.tokens import ByteTokenizer
from wg_blocks.tools import Calculator, Echo, calculate
from wg_blocks.toy import ToyBackbone, ToyCodec, ToyConditioner
from wg_core import Block, Graph, ModelPool, Port
from wg_core.errors import ConfigError, MissingInputError, NodeExecutionError, PortValueError, StateDictError, ToolError

X = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 2, 2, 2)


class Field(Block):
    """A known slope dx/dt = f(x, t)."""

    ports = (Port("latent", "in", "tensor"), Port("timestep", "in", "tensor|number"), Port("pred", "out", "tensor"))

    def __init__(self, slope: Any) -> None:
        super().__init__()
        self.slope = slope
        self.calls = 0

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return {"pred": self.slope(inputs["latent"], inputs["timestep"])}


def loop(solver: Block, slope: Any) -> tuple[Graph, Field]:
    """A sampling loop around `slope`, with awkward node names."""
    graph, field = Graph("loop"), Field(slope)
    graph.add_node(field, "zz_field")
    graph.add_node(solver, "a_solver")
    graph.add_edge("zz_field", "pred", "a_solver", "pred")
    for port in ("latent", "timestep"):
        for node_id in ("zz_field", "a_solver"):
            graph.expose_input(node_id, port, port)
            graph.add_edge("a_solver", f"next_{port}", node_id, port, carry=True)
    graph.expose_output("a_solver", "next_latent", "x")
    graph.expose_output("a_solver", "next_timestep", "t")
    return graph, field


def sample(solver: Block, slope: Any, steps: int, start: Any = 1.0) -> tuple[Any, Any, int]:
    graph, field = loop(solver, slope)
    found = graph.run({"latent": X, "timestep": start}, num_loop_steps=steps)
    return found["x"], found["t"], field.calls


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_is_the_closed_form(steps: int) -> None:
    # proves 01 A-9
    x, t, calls = sample(Euler(), lambda x, t: x, steps)
    torch.testing.assert_close(x, X * (1 - 1 / steps) ** steps)
    assert t == 0 and calls == steps
    x, t, _ = sample(Euler(), lambda x, t: torch.full_like(x, 3.0), steps, start=0.6)
    torch.testing.assert_close(x, X - 3 * 0.6)
    assert t == 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_heun_evaluates_twice_a_step_but_the_last_and_is_the_closed_form(steps: int) -> None:
    h = 1 / steps
    x, t, calls = sample(Heun(), lambda x, t: x, steps)
    torch.testing.assert_close(x, X * (1 - h + h * h / 2) ** (steps - 1) * (1 - h))
    assert t == 0 and calls == 2 * steps - 1 == Heun().iterations(steps)


def test_heun_is_closer_than_euler() -> None:
    exact = X * math.exp(-1)
    errors = [(sample(s, lambda x, t: x, 20)[0] - exact).abs().max() for s in (Heun(), Euler())]
    assert errors[0] < errors[1] / 4


def test_one_heun_serves_two_loops_and_notices_a_half_step() -> None:
    solver = Heun()
    one, two = (sample(solver, lambda x, t, k=k: k * x, 3)[0] for k in (1, 2))
    alone = [sample(Heun(), lambda x, t, k=k: k * x, 3)[0] for k in (1, 2)]
    assert torch.equal(one, alone[0]) and torch.equal(two, alone[1])
    with pytest.raises(PortValueError, match="completes a step that was not begun"):
        solver.run({"latent": X, "timestep": 0.5, "pred": X, "loop_index": 1, "loop_total": 3})
    with pytest.raises(PortValueError, match="beyond its end"):
        Euler().run({"latent": X, "timestep": 0.5, "pred": X, "loop_index": 3, "loop_total": 3})


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_ddim_finds_the_picture_when_the_prediction_is_right(prediction: str) -> None:
    picture = torch.full_like(X, 0.25)

    def right(x: Any, t: float) -> Any:
        a = max(math.cos(math.pi * t / 2) ** 2, 1e-4)
        return picture if prediction == "x0" else (x - a**0.5 * picture) / (1 - a) ** 0.5

    x, t, _ = sample(DDIM(prediction=prediction), right, 6)
    torch.testing.assert_close(x, picture, rtol=1e-5, atol=1e-5)
    assert t == 0
    with pytest.raises(ConfigError, match="'epsilon' or 'x0'"):
        DDIM(prediction="noise")


@pytest.mark.parametrize("solver", [Euler, Heun, DDIM])
def test_times_of_a_batch_are_used_one_by_one(solver: type[Block]) -> None:
    times = torch.tensor([1.0, 0.5], dtype=torch.float64)
    both = solver(num_steps=2).run({"latent": X, "timestep": times, "pred": X + 1})
    for i in range(2):
        one = solver(num_steps=2).run({"latent": X[i : i + 1], "timestep": float(times[i]), "pred": X[i : i + 1] + 1})
        torch.testing.assert_close(both["next_latent"][i : i + 1], one["next_latent"])
        assert float(both["next_timestep"][i]) == pytest.approx(one["next_timestep"])


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3"])
def test_steps_are_whole_numbers(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="num_steps"):
        Euler(num_steps=wrong)


def test_guidance_is_the_formula() -> None:
    cond, uncond = X, X * 0.5
    assert torch.equal(
        ClassifierFree().run({"pred_cond": cond, "pred_uncond": uncond})["pred_guided"], uncond + 5 * (cond - uncond)
    )
    given = ClassifierFree().run({"pred_cond": cond, "pred_uncond": uncond, "scale": torch.tensor([1.0, 0.0])})
    assert torch.equal(given["pred_guided"][0], cond[0]) and torch.equal(given["pred_guided"][1], uncond[1])
    with pytest.raises(MissingInputError, match="pred_uncond"):
        ClassifierFree().run({"pred_cond": cond})


def test_noise_follows_the_seed() -> None:
    # proves 01 E-1
    def drawn(**options: Any) -> Any:
        graph = Graph("g")
        graph.add_node(Noise(shape=[1, 2, 3]), "begin")
        return graph.run(**options)["latent"]

    before = torch.get_rng_state()
    assert torch.equal(drawn(seed=1), drawn(seed=1)) and not torch.equal(drawn(seed=1), drawn(seed=2))
    assert torch.equal(torch.get_rng_state(), before)
    asked = Noise().run({"seed": 5, "shape": [2, 4]})
    assert asked["latent"].shape == (2, 4) and asked["timestep"] == 1.0
    assert torch.equal(asked["latent"], Noise().run({"seed": 5, "shape": [2, 4]})["latent"])
    far = Noise(strength=0.25).run({"seed": 5, "init_latent": torch.ones(2, 4)})
    torch.testing.assert_close(far["latent"], 0.75 + 0.25 * asked["latent"])
    assert far["timestep"] == 0.25
    for wrong in ([], [0], ["a"], [1.5]):
        with pytest.raises(ConfigError, match="shape"):
            Noise(shape=wrong)
    with pytest.raises(ConfigError, match="strength"):
        Noise(strength=0)


# ---- toy networks --------------------------------------------------------------------------------------------------------


def postcard(pool: ModelPool, **nodes: Any) -> Graph:
    graph = Graph("postcard")
    for node_id, (block_type, config) in {
        "tok": ("tokenizer/bytes", {"max_length": 16}),
        "txt": ("conditioner/toy", {"dim": 8}),
        "begin": ("initializer/noise", {"shape": [2, 4, 4, 4]}),
        "net": ("backbone/toy", {"condition_dim": 8}),
        "step": ("solver/heun", {}),
        "picture": ("codec/toy", {}),
        **nodes,
    }.items():
        graph.add_node(block_type, node_id, config=config, pool=pool)
    graph.expose_input("tok", "text", "prompt")
    graph.expose_output("picture", "decode_image", "image")
    return graph


def test_prompt_in_picture_out_reproducible_through_save_and_load(tmp_path: Any) -> None:
    # proves 01 T-22
    graph = postcard(ModelPool())
    prompts = {"prompt": ["a harbour", "a storm"]}
    image = graph.run(prompts, num_loop_steps=3, seed=4)["image"]
    assert image.shape == (2, 3, 8, 8) and 0 <= float(image.min()) <= float(image.max()) <= 1
    other = graph.run({"prompt": ["a harbour", "a harbour"]}, num_loop_steps=3, seed=4)["image"]
    assert torch.equal(other[0], image[0]) and not torch.equal(other[1], image[1])
    graph.save(tmp_path / "saved")
    assert torch.equal(Graph.load(tmp_path / "saved").run(prompts, num_loop_steps=3, seed=4)["image"], image)


def test_gradients_flow_through_the_loop_and_training_lowers_the_loss() -> None:
    graph = postcard(ModelPool())
    graph.set_trainable("picture", False)
    optimizer = torch.optim.Adam(graph.trainable_parameters(), lr=0.01)
    frozen = {k: v.clone() for k, v in graph.nodes["picture"].child.state_dict().items()}
    losses: list[float] = []
    for _ in range(8):
        optimizer.zero_grad()
        image = graph.run({"prompt": ["a", "b"]}, num_loop_steps=2, seed=1, training=True)["image"]
        loss = (image - 0.9).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] * 0.9
    assert all(p.grad is not None for p in graph.nodes["txt"].child.trainable_parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in graph.nodes["picture"].child.state_dict().items())


def test_toy_blocks_say_what_does_not_fit() -> None:
    net = ToyBackbone(condition_dim=8)
    with pytest.raises(PortValueError, match="last dimension must be 8"):
        net.run({"latent": torch.zeros(1, 4, 4, 4), "timestep": 1, "condition": torch.zeros(1, 3, 9)})
    for ids in (torch.zeros(1, 3), torch.zeros(3, dtype=torch.int64), torch.full((1, 1), 257)):
        with pytest.raises(PortValueError, match="token ids are whole"):
            ToyConditioner().run({"input": ids})
    with pytest.raises(MissingInputError):
        ToyCodec().run({})


def test_toy_features_and_masks_count() -> None:
    net, latent = ToyBackbone(), torch.zeros(1, 4, 4, 4)
    plain = net.run({"latent": latent, "timestep": 1})["pred"]
    helped = net.run({"latent": latent, "timestep": 1, "adapter_features": {"a:adapted": latent + 1}})["pred"]
    assert torch.equal(helped, net.run({"latent": latent + 1, "timestep": 1})["pred"]) and not torch.equal(
        helped, plain
    )
    text, ids = ToyConditioner(), ByteTokenizer().run({"text": ["ab", "a"]})
    found = text.run({"input": ids["token_ids"], "attention_mask": ids["attention_mask"]})
    assert torch.equal(found["pooled"], text.run({"input": ["ab", "a"]})["pooled"])
    torch.testing.assert_close(found["pooled"][1], text.run({"input": "a"})["pooled"][0])


def test_tokens_are_bytes() -> None:
    block = ByteTokenizer(max_length=3)
    assert block.run({"text": "abcd"})["token_ids"].tolist() == [[98, 99, 100]]
    assert block.run({"decode_token_ids": torch.tensor([[98, 99, 0]])})["decoded_text"] == "ab"
    for wrong in (torch.tensor([98]), torch.tensor([[1.5]]), torch.tensor([[257]]), torch.tensor([[-1]])):
        with pytest.raises(PortValueError, match="decode_token_ids"):
            block.run({"decode_token_ids": wrong})
    with pytest.raises(ConfigError, match="max_length"):
        ByteTokenizer(max_length=0)


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_texts_survive_tokens(texts: list[str]) -> None:
    found = ByteTokenizer().run({"text": texts}, strict_types=True)
    back = ByteTokenizer().run({"decode_token_ids": found["token_ids"]}, strict_types=True)["decoded_text"]
    assert back == (texts if len(texts) > 1 else texts[0])


# ---- tools and the scripted agent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 + 3 * 4", 14), (" -(2 ** 10) // 3", -342), ("7 % 4 / 2", 1.5), ("sqrt(16) + max(1, 2.5)", 6.5), ("2 ** -1", 0.5),
     ("cos(pi)", -1.0), ("+1", 1), ("round(2.567, 1)", 2.6)],
)  # fmt: skip
def test_arithmetic_is_right(expression: str, value: float) -> None:
    assert calculate(expression) == value
    assert Calculator().run({"expression": expression}, strict_types=True)["result"] == value


@pytest.mark.parametrize(
    "expression",
    ["", "1 +", "__import__('os')", "(1).real", "[1][0]", "lambda: 1", "x", "'a' * 9", "True", "2j", "1 if 1 else 2", "9 ** 9 ** 9",
     "2 ** 300", "10 ** 70 * 10 ** 70", "1 / 0", "(-1) ** 0.5", "1e308 * 10", "sqrt(-1)", "max(x=1)", "abs()", "(" * 300 + "1" + ")" * 300,
     "1+" * 500 + "1", "2 ** 2.5 ** 1000", "f(1)", "1 and 2", "1 < 2", "(a := 1)", "0.0 ** -1", "9" * 399],
)  # fmt: skip
def test_anything_else_is_refused(expression: str) -> None:
    with pytest.raises(ToolError):
        calculate(expression)


@given(st.text(alphabet="0123456789+-*/%(). ,esqrtpimax", max_size=40))
def test_no_text_breaks_the_calculator(expression: str) -> None:
    with contextlib.suppress(ToolError):
        assert isinstance(calculate(expression), int | float)


def test_the_echo_gives_back() -> None:
    assert Echo().run({"value": {"a": [1]}}) == {"result": {"a": [1]}}


CALL = {"tool_calls": [{"tool_id": "calc", "arguments": {"expression": "1+1"}}]}


def test_a_script_is_followed_and_the_session_is_state(tmp_path: Any) -> None:
    # proves 01 F-42, A-11 (session part)
    agent = ScriptedAgent(script=[CALL, "it is {results}"])
    asked = agent.run({"context": "one and one?"}, strict_types=True)
    assert asked == {"tool_calls": [{"tool_id": "calc", "arguments": {"expression": "1+1"}, "call_id": "call_0_0"}]}
    agent.save_checkpoint(tmp_path / "session")
    results = [{"call_id": "call_0_0", "tool_id": "calc", "result": 2}]
    said = agent.run({"context": "one and one?", "tool_results": results})
    assert said == {"response": "it is 2"}
    assert [m["role"] for m in agent.messages] == ["user", "assistant", "tool", "assistant"]
    other = ScriptedAgent(script=[CALL, "it is {results}"])
    other.load_from_checkpoint(tmp_path / "session")
    assert other.run({"context": "one and one?", "tool_results": results}) == said and other.messages == agent.messages
    agent.reset_session()
    assert agent.messages == [] and "tool_calls" in agent.run({"context": "again"})
    asked["tool_calls"].clear()
    assert agent.script[0] == CALL  # what was given out is a copy


def test_memory_for_a_run_begins_anew_with_each_question() -> None:
    kept, short = (ScriptedAgent(script=["a", "b"], memory=m) for m in ("persistent", "run"))
    assert [kept.run({"context": "x"})["response"] for _ in range(3)] == ["a", "b", "a"]
    assert [short.run({"context": "x"})["response"] for _ in range(3)] == ["a", "a", "a"]
    assert len(kept.messages) == 6 and len(short.messages) == 2


def test_a_wrong_script_or_session_is_refused() -> None:
    for script in ([], [3], [{"say": "x"}], [{"tool_calls": [{"tool_id": "x"}]}], [{}]):
        with pytest.raises(ConfigError, match="script"):
            ScriptedAgent(script=script)
    with pytest.raises(ConfigError, match="memory"):
        ScriptedAgent(script=["a"], memory="forever")
    agent = ScriptedAgent(script=["a"])
    with pytest.raises(StateDictError):
        agent.load_state_dict({"session.turn": -1, "session.messages": []})
    assert agent.turn == 0


def test_a_tool_that_fails_names_its_place() -> None:
    graph = Graph("g")
    graph.add_node(Calculator(), "calc")
    with pytest.raises(NodeExecutionError, match=r"g/calc failed: ToolError: cannot evaluate '1/0'"):
        graph.run({"expression": "1/0"})

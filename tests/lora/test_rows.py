"""Rows of one batch, each with the adapters of its own call: what a world gets equals what it gets alone."""

from __future__ import annotations

from contextvars import copy_context
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from wg_core import step_together
from wg_core.errors import AbortRun, AdapterError, JointStepError
from wg_core.levels.lora_world import lora_world
from wg_core.levels.training import calling
from wg_core.state.store import SnapshotStore
from wg_core.weights.lora import per_row, working_on
from worlds import AT, base_world, block_at, teach


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.getbasetemp() / "worlds"
    made.mkdir(exist_ok=True)
    return made


def test_one_padded_batch_for_several_worlds(folder: Path, tmp_path: Path) -> None:
    """03 L-3: base, two worlds and a world with two sets in one batch; logits and greedy tokens as one by one."""
    base = base_world(folder, tmp_path / "snapshots")
    worlds: list[Any] = [base, lora_world(base, "noir"), lora_world(base, "calm", per_stage=True), lora_world(base, "both", rank=2)]
    worlds[3].add_adapter("more", rank=3)
    for seed, world in enumerate(worlds[1:], 1):
        teach(world, seed)
    block: Any = block_at(base, AT["judge"])
    prompts = [block._prompt_ids([{"role": "user", "content": "The lamp" * (i + 1)}]) for i in range(4)]

    def written(rows: list[list[int]], steps: int = 5) -> list[list[int]]:
        """Greedy continuations, the batch padded on the left."""
        rows = [list(r) for r in rows]
        for _ in range(steps):
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            scores = block.modules["lm"](input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]
            for row, token in zip(rows, scores.argmax(-1).tolist(), strict=True):
                row.append(token)
        return rows

    alone, chosen = [], []
    with torch.no_grad():
        for world, prompt in zip(worlds, prompts, strict=True):
            with calling(world, AT["judge"], training=False):
                chosen.append(working_on(block))
                alone += written([prompt])
        with per_row(chosen):
            together = written(prompts)
            logits = block.modules["lm"](torch.tensor([[1, 5, 7]] * 4)).logits
        singles = []
        for world in worlds:
            with calling(world, AT["judge"], training=False):
                singles.append(block.modules["lm"](torch.tensor([[1, 5, 7]])).logits)
    assert [len(c) for c in chosen] == [0, 1, 1, 2]
    assert together == alone
    torch.testing.assert_close(logits, torch.cat(singles), atol=1e-5, rtol=1e-4)
    assert len({tuple(r.flatten().tolist()) for r in logits}) == 4
    with per_row(chosen), pytest.raises(AdapterError, match="does not begin with the batch of 4 rows"):
        block.modules["lm"](torch.tensor([[1, 5, 7]] * 3))


def test_worlds_decode_together_what_they_write_alone(folder: Path, tmp_path: Path) -> None:
    """03 L-3: calls of the base and of LoRA worlds are one batch, rows narrowing as answers end; texts as alone."""
    base = base_world(folder, tmp_path / "snapshots")
    worlds: list[Any] = [base, *(lora_world(base, name) for name in ("noir", "calm", "loud"))]
    for seed, world in enumerate(worlds[1:], 1):
        teach(world, seed)
    block: Any = block_at(base, AT["judge"])
    asked = [{"prompt": "The lamp.", "params": {"seed": 1, "max_new_tokens": 6 * (i + 1)}} for i in range(4)]
    alone, runs, contexts, wanted = [], [], [], []
    with torch.no_grad():
        for world, inputs in zip(worlds, asked, strict=True):
            with calling(world, AT["judge"], training=False):
                alone.append(block.forward(inputs)["text"])
                contexts.append(copy_context())
                runs.append(block.batch_forward(inputs))
                wanted.append(contexts[-1].run(next, runs[-1]))
        sizes: list[int] = []
        block.module.register_forward_hook(lambda m, a, k, o: sizes.append(len(k["input_ids"])), with_kwargs=True)
        together = []
        for context, run, known in zip(contexts, runs, block.answer_batch(wanted), strict=True):
            with pytest.raises(StopIteration) as done:
                context.run(run.send, known)
            together.append(done.value.value["text"])
    assert together == alone and len(set(alone)) == 4
    assert {1, 4} <= set(sizes) and sorted(sizes[sizes.index(4) :], reverse=True) == sizes[sizes.index(4) :]


def test_worlds_step_together_with_the_adapters_of_each(folder: Path, tmp_path: Path) -> None:
    """03 L-3: base and LoRA worlds step as one batch and write what they write alone; one that is stopped stops alone."""
    base = base_world(folder, tmp_path / "snapshots")
    worlds: list[Any] = [base, *(lora_world(base, name) for name in ("noir", "calm"))]
    for seed, world in enumerate(worlds[1:], 1):
        teach(world, seed)

    def again(place: str) -> list[Any]:
        made = [copy(world) for world in worlds]
        for world in made:
            world.store = SnapshotStore(tmp_path / place)
        return made

    alone = [world.step(seed=5) for world in again("alone")]
    sizes: list[int] = []
    block: Any = block_at(base, AT["judge"])
    block.module.register_forward_hook(lambda m, a, k, o: sizes.append(len(k["input_ids"])), with_kwargs=True)
    joint = again("joint")
    assert [s.id for s in step_together(joint, seed=5)] == [s.id for s in alone]
    assert sizes.count(3) > 5 and len({s.carried["outcome"]["narrative"] for s in alone}) == 3
    assert all(world.replay().same for world in joint)

    def stop(event: Any) -> None:
        if event.kind == "progress" and event.path.startswith("noir/judge/"):
            raise AbortRun("enough")

    with pytest.raises(JointStepError) as caught:
        step_together(again("stopped"), seed=5, hooks=[stop])
    assert isinstance(caught.value.errors.pop("noir"), AbortRun) and not caught.value.errors
    assert [caught.value.snapshots[i].id for i in ("base", "calm")] == [alone[0].id, alone[2].id]

"""A LoRA world trained on a world's own history: through `wg`, after a stop, and beside its base."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_project import AUTHOR, Tiny
from typer.testing import CliRunner, Result

from resources.mlflow_training import RUN_FILE
from wg_blocks.comparison import loss_of, verdict
from wg_blocks.examples import Examples, learners
from wg_blocks.lora_training import LoraSettings, gather, loss_on, training_config
from wg_core import World
from wg_core.errors import ConfigError
from wg_core.levels.lora_world import LoraWorld
from wg_defs.cli import app
from wg_defs.comparison_report import html, markdown
from wg_defs.train import begin, collect_examples, result_of, tracker_of, train, training_folder, untrained

QUICK = ["--steps", "6", "--lr", "0.02", "--rank", "4", "--samples", "0"]


def wg(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All adapter tensors in a folder."""
    return {f"{p.parent.name}/{k}": v for p in sorted(folder.rglob("*.safetensors")) for k, v in load_file(p).items()}


@pytest.fixture
def calm(at_home: Tiny) -> dict[str, Any]:
    """What `wg train tide --name calm` gave, run once for all tests."""
    file = training_folder("tide", "calm") / "result.json"
    if not file.is_file():
        result = wg("train", "tide", "--name", "calm", *QUICK, "--json")
        assert result.exit_code == 0, result.output
        assert {**result_of("tide", "calm"), "file": str(at_home.root / "worlds" / "calm.yaml")} == json.loads(
            result.stdout
        )
    return result_of("tide", "calm")


def test_rows_of_a_history_are_its_calls(tiny: Tiny) -> None:
    """03 L-5: what each stage was asked, with the context that it was given, and what it answered."""
    world = tiny.world()
    assert set(learners(world)) == {
        AUTHOR,
        "philosopher/describe/describe/llm",
        "development/intend/intend/llm",
        "architect/plan/plan/llm",
    }
    examples = gather(world, LoraSettings(name="any"))
    row = next(r for r in examples.rows if r["path"] == AUTHOR)
    assert row["messages"][-1]["content"].startswith("What is known:") and json.loads(row["answer"])["narrative"]
    assert row["schema"]["properties"]["narrative"] and row["world_id"] == "tide"
    some = gather(world, LoraSettings(name="any", stages=("author",), first=3, last=6))
    assert {(r["stage"], r["step"]) for r in some.rows} == {("author", step) for step in (3, 4, 5, 6)}


def test_the_loss_asks_each_row_at_its_own_place(tiny: Tiny) -> None:
    """03 L-3, L-6: a batch of several stages is the mean over all its tokens, each with the adapters of its stage."""
    world = tiny.world()
    rows = gather(world, LoraSettings(name="any")).rows[:6]
    loss, tokens = loss_on(world)(rows)
    alone = [loss_on(world)([row]) for row in rows]
    assert tokens == sum(n for _, n in alone)
    assert float(loss.detach()) == pytest.approx(sum(float(x.detach()) * n for x, n in alone) / tokens, rel=1e-4)
    measured = loss_of(world, rows)
    assert measured["loss"] == pytest.approx(float(loss.detach()), rel=1e-4) and measured["tokens"] == tokens


def test_minutes_become_steps(tiny: Tiny) -> None:
    world = tiny.world()
    examples = gather(world, LoraSettings(name="any"))
    settings = LoraSettings(name="any", minutes=1.0)
    from wg_defs.train import untrained

    lora = untrained(world, settings)
    first = training_config(lora, settings, examples).steps
    assert first > 10 and all(p.grad is None for p in lora.trainable_parameters())
    assert training_config(lora, LoraSettings(name="any"), examples).steps == -(-2 * len(examples.split("train")) // 4)


def test_train_from_the_command_line(at_home: Tiny, calm: dict[str, Any]) -> None:
    """03 L-2, L-4, L-6: one command makes a world on a base that stays as it is; MLflow has the run."""
    made, base = calm, at_home.world()
    assert made["steps"] == 6 and made["held_out_loss"]["lora"] < made["held_out_loss"]["base"]
    assert AUTHOR in made["adapted"] and "it has no torch weights" in made["passed_over"].values()
    lora = World.from_yaml(at_home.root / "worlds" / "calm.yaml")
    assert isinstance(lora, LoraWorld) and lora.base.config_hash == base.config_hash == made["base_hash"]
    peft = Path(made["adapters"], "default")
    assert [p.name for p in peft.rglob("adapter_config.json")] == ["adapter_config.json"]

    held_out = Examples.load(training_folder("tide", "calm") / "examples.jsonl").split("held_out")
    assert loss_of(lora, held_out)["loss"] == pytest.approx(made["held_out_loss"]["lora"], rel=1e-3)
    assert loss_of(base, held_out)["loss"] == pytest.approx(made["held_out_loss"]["base"], rel=1e-3)

    client = tracker_of().client()
    run = client.get_run(made["mlflow"]["run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["wg/steps"] == "0..9"
    assert run.data.tags["wg/snapshots"] == "..".join(base.store.get("tide", step).id for step in (0, 9))
    for name in ("training.lr", "lora.rank", "base.config_hash", "examples.hash", "code_version"):
        assert run.data.params[name]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert {"lr", "tokens_per_s", "held_out_loss"} <= set(run.data.metrics)
    champion = client.get_model_version_by_alias("calm", "champion")
    assert str(champion.version) == made["model"]["version"] and champion.tags["wg/base_hash"] == base.config_hash

    again = wg("train", "tide", "--name", "calm", *QUICK)
    assert again.exit_code == 2 and "--restart" in again.stderr
    refused = wg("train", "calm", *QUICK)
    assert refused.exit_code == 2 and "is a LoRA world itself" in refused.stderr


def test_a_training_that_was_stopped_before_its_world_was_written(at_home: Tiny, calm: dict[str, Any]) -> None:
    """03 L-6: what was learned is not lost; the same command, or --resume, writes the world and trains nothing again."""
    file = at_home.root / "worlds" / "calm.yaml"
    text = file.read_text()
    for more in (QUICK, ("--resume",)):
        file.unlink()
        result = wg("train", "tide", "--name", "calm", *more, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["seconds"] == calm["seconds"] and file.read_text() == text
    file.unlink()
    other = wg("train", "tide", "--name", "calm", *QUICK[:-2], "--rank", "2")
    assert other.exit_code == 2 and "--restart" in other.stderr and not file.exists()
    file.write_text(text)


@pytest.mark.slow
def test_compare_writes_a_report_and_has_bounds(at_home: Tiny, calm: dict[str, Any]) -> None:
    """03 L-7: held-out loss, valid structures and diversity, both from equal seeds, in files and in MLflow."""
    history = [s.id for s in at_home.world().history()]
    done = json.loads(wg("compare", "tide", "calm", "--steps", "1", "--asked", "1", "--json").stdout)
    report = done["report"]
    assert done["wrong"] == [] and report["lora"]["loss"] < report["base"]["loss"]
    assert report["base"]["free"]["asked"] == 1 and report["lora"]["structures"]["valid_share"] is not None
    assert [s.id for s in at_home.world().history()] == history
    page = Path(done["files"]["html"]).read_text()
    assert "data:image/jpeg;base64," in page and 'src="http' not in page and "perplexity" in page
    run = tracker_of().client().get_run(calm["mlflow"]["run_id"])
    assert run.data.metrics["compare/lora/held_out_loss"] == report["lora"]["loss"]
    kept = [a.path for a in tracker_of().client().list_artifacts(calm["mlflow"]["run_id"], "comparison")]
    assert kept == ["comparison/report.html", "comparison/report.json", "comparison/report.md"]
    assert "is not below 0.5 times that of the base" in verdict(report, loss_ratio=0.5)[0]
    unknown = wg("compare", "calm", "tide")
    assert unknown.exit_code == 2 and "there are no held-out examples of 'tide' on 'calm'" in unknown.stderr


def test_what_a_model_wrote_is_text_in_the_report(tmp_path: Path) -> None:
    """Safety: nothing that a model writes becomes markup."""
    bad = '<script>alert(1)</script> | "quoted"'
    step = {"number": 0, "story": bad, "intent": bad, "seen": [bad], "pictures": [], "structured": 1, "first_try": 1}
    numbers = {"asked": 1, "valid_share": 1.0, "first_try_share": 1.0, "valid": 1}
    side = {"loss": 1.0, "perplexity": 2.7, "tokens": 9, "by_stage": {"author": 1.0}, "free": numbers, "structures": numbers,
            "diversity": {"texts": 1, "words": 3, "distinct_1": 1.0, "distinct_2": 1.0}, "lived": [step]}  # fmt: skip
    report = {"seed": 0, "steps": 1, "base": {**side, "world_id": "tide"}, "lora": {**side, "world_id": "calm"}}
    assert "<script>" not in html(report, tmp_path) and "<script>" not in markdown(report)
    assert verdict(report) == ["held-out loss 1.0000 is not below 1 times that of the base, 1.0000"]
    worse = {**report, "lora": {**report["lora"], "loss": 0.5, "structures": {**numbers, "valid_share": 0.4}}}
    assert verdict(worse) == ["40% of the structures are valid; the bound is 90%"]


@pytest.mark.slow
def test_a_killed_training_goes_on_to_equal_weights(at_home: Tiny, calm: dict[str, Any]) -> None:
    """03 L-6, 02 T-10: killed without warning, it goes on as the same MLflow run, to the weights of one that was not."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from wg_blocks.lora_training import LoraSettings\n"
        "from wg_defs.train import tracker_of, train\n"
        "def kill(event):\n"
        "    if event.kind == 'train_step' and event.data['step'] == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "settings = LoraSettings(name='cut', steps=6, lr=0.02, rank=4, samples=0)\n"
        "train(Path('worlds/tide.yaml'), settings, tracker=tracker_of(), hooks=[kill])\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = training_folder("tide", "cut")
    run_id = json.loads((folder / RUN_FILE).read_text())["run_id"]
    other = wg("train", "tide", "--name", "cut", *QUICK[:-2], "--rank", "2")
    assert other.exit_code == 2 and "has another rank and samples" in other.stderr and "--resume" in other.stderr
    made = json.loads(wg("train", "tide", "--name", "cut", "--resume", "--json").stdout)
    assert 0 < made["resumed_at"] < 4 and made["steps"] == 6 and made["mlflow"]["run_id"] == run_id
    assert made["held_out_loss"] == calm["held_out_loss"]
    for name, tensor in weights(folder / "adapters").items():
        assert torch.equal(tensor, weights(Path(calm["adapters"]))[name]), name


def hears_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize(("end", "more"), [(signal.SIGINT, []), (signal.SIGTERM, ["--dagster"])])
def test_an_interrupt_keeps_what_was_learned(at_home: Tiny, end: signal.Signals, more: list[str]) -> None:
    """03 L-6: Ctrl-C, and a stop of a run through Dagster, end with the command that goes on, and with no more lines."""
    name = "held" if more else "paused"
    command = [sys.executable, "-m", "wg_defs.cli", "train", "tide", "--name", name, *QUICK[:-4], "--samples", "0", *more]
    command[command.index("--steps") + 1] = "200"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts
    )
    state = training_folder("tide", name) / "training_state" / "state.json"
    until = time.monotonic() + 240
    while not state.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(end)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and " ".join(["wg train tide --name", name, "--resume", *more]) in said
    assert "Traceback" not in said and "Stack Trace" not in said
    assert state.is_file() and not (at_home.root / "worlds" / f"{name}.yaml").exists()


def test_too_few_steps_say_how_to_get_more(at_home: Tiny) -> None:
    few = wg("train", "tide", "--name", "few", "--stage", "author", "--from", "history", "--held-out", "0.9")
    assert few.exit_code == 2 and "too few examples" in few.stderr and "wg run tide --steps 8" in few.stderr
    (at_home.root / "note.txt").write_text("One short note.")
    text = wg("train", "tide", "--name", "few", "--from", "note.txt")
    assert text.exit_code == 2 and "0 to train on" in text.stderr
    assert wg("train", "tide", "--from", "note.doc").exit_code == 2
    assert wg("train", "tide", "--steps", "1", "--minutes", "1").exit_code == 2
    with pytest.raises(ConfigError, match="rank: Input should be greater than or equal to 1"):
        LoraSettings.of({"name": "x", "rank": 0})


def test_wrong_sources_are_read_again_and_forget_nothing(at_home: Tiny) -> None:
    """03 L-5, L-6: examples that do not pass are not kept; --restart without any, or elsewhere, leaves what is there."""
    told = " ".join(f"On day {n} the keeper wrote {n} names into the book and lit the lamp." for n in range(90))
    file = at_home.root / "odd.txt"
    settings = LoraSettings(name="odd", sources=(str(file),))
    file.write_text(told + "\n\n" + " ".join(f"Корабль номер {n} стоит под дождём и ждёт утра." for n in range(20)))
    base, _ = begin(at_home.file, settings, None)
    _, table, found = collect_examples(base, settings, None)
    assert [check.name for check in found if not check.passed] == ["script"] and not table.exists()
    shown = wg("train", "tide", "--name", "odd", "--from", str(file), "--dagster")
    assert shown.exit_code == 3 and "training_examples: script" in shown.stderr and "'Корабль" in shown.stderr
    file.write_text(told)
    _, table, found = collect_examples(base, settings, None)
    assert all(check.passed for check in found) and table.is_file()

    wrong = settings.model_copy(update={"targets": ("stage:nobody/*",)})
    file.unlink()
    with pytest.raises(FileNotFoundError):
        begin(at_home.file, settings, None, restart=True)
    file.write_text(told)
    with pytest.raises(ConfigError, match="is no part of world 'tide'"):
        begin(at_home.file, wrong, None, restart=True)
    assert table.is_file()
    with pytest.raises(ConfigError, match=r"tide\.yaml exists already; choose another --name$"):
        begin(at_home.file, settings.model_copy(update={"name": "tide"}), None, restart=True)
    bare = wg("train", "tide", "--name", "odd", "--from", str(file), "--modules", "nothing*", "--restart")
    assert bare.exit_code == 2 and "no layer of the blocks to adapt matches nothing*" in bare.stderr
    assert not table.exists()


def test_without_a_tracker_it_trains_all_the_same(at_home: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """03 L-6: MLflow is optional; from a text, and with adapters of its own for each stage."""
    monkeypatch.setenv("WG_MLFLOW", "off")
    sentences = [f"On day {n} the keeper wrote {n} names into the book and lit the lamp." for n in range(90)]
    (at_home.root / "book.txt").write_text("\n\n".join(sentences))
    result = wg(
        "train", "tide", "--name", "booked", "--from", "book.txt", "--from", "history", "--per-stage", *QUICK, "--json"
    )
    made: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert made["mlflow"] == {} and made["mlflow_error"] == "" and made["examples"]["stages"]["author"] > 15
    assert len(list(Path(made["adapters"], "default").rglob("adapter_config.json"))) == 4
    assert result_of("tide", "booked")["name"] == "booked"
    with pytest.raises(ConfigError, match="'none' has not been trained on 'tide'"):
        result_of("tide", "none")
    lora = World.from_yaml(at_home.root / "worlds" / "booked.yaml")
    held_out = Examples.load(training_folder("tide", "booked") / "examples.jsonl").split("held_out")
    assert loss_of(lora, held_out)["loss"] == pytest.approx(made["held_out_loss"]["lora"], rel=1e-3)


def test_a_base_that_changed_is_refused(at_home: Tiny) -> None:
    """03 L-2, L-6: a training does not go on over another base; --restart begins on the base as it is now."""
    settings = LoraSettings(name="torn")
    base, settings = begin(at_home.file, settings, None)
    collect_examples(base, settings, None)
    text = at_home.file.read_text()
    at_home.file.write_text(text.replace("Draw a map for:", "Draw an old map for:"))
    try:
        with pytest.raises(ConfigError, match="began on 'tide' as it was"):
            train(at_home.file, settings, tracker=tracker_of(enabled=False))
        old = untrained(base, settings).save_config(at_home.root / "worlds" / "torn.yaml", base_file="tide.yaml")
        with pytest.raises(ConfigError, match="that world now has"):
            World.from_yaml(old)
        _, begun = begin(at_home.file, settings, None, restart=True)
        assert begun == settings and not old.exists()
    finally:
        at_home.file.write_text(text)

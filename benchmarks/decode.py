"""Decode speed of the default language model in float32, 8 and 4 bits and by llama.cpp, and what bits cost in quality.

`python benchmarks/decode.py [--tokens N] [--rounds N]`. All run on one thread, in turns, from one file of weights: llama.cpp
reads it as it is, int4 and its output layer hold the same numbers, float32 what they stand for. Each figure is the median
of its rounds; the time of a prompt is taken off. Perplexity is that of a fixed text of this repository, read token by token
as in decoding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from wg_blocks.llm_local import CausalLM
from wg_blocks.reading import reader_of
from wg_blocks.store import ModelStore, progress_bar
from wg_core import Block

NAME = "smollm2-135m-instruct"
TEXT = Path(__file__).parent.parent / "docs" / "decisions" / "0005-endpoints.md"
ASK = {"prompt": "Tell a long story about a harbour town."}
SCHEMA = {"type": "string", "minLength": 200, "maxLength": 200}


def decode_speed(block: Block, tokens: int, schema: Any = None) -> float:
    """Tokens per second of one answer, without the time of its prompt."""

    def timed(number: int) -> tuple[int, float]:
        params = {"max_new_tokens": number, "temperature": 0.6, "seed": 1}
        given = {**ASK, "params": params, **({"schema": schema} if schema and number > 1 else {})}
        begun = time.perf_counter()
        usage = block.run(given)["usage"]
        return usage["completion_tokens"], time.perf_counter() - begun

    timed(1)  # loads the model, and fills what is kept of the prompt
    if schema:
        block.run({**ASK, "schema": {"enum": ["a"]}, "params": {"seed": 1}})  # reads the tokenizer for schemas
    _, one = timed(1)
    number, whole = timed(tokens)
    return (number - 1) / (whole - one)


def perplexity(block: CausalLM, tokens: int) -> float:
    """exp of the mean cross-entropy of each token of the text, given those before it."""
    import torch

    reader, losses = reader_of(block.module), []
    reader.begin([])
    ids = block.tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids[:tokens]
    with torch.no_grad():
        for token, following in itertools.pairwise(ids):
            losses.append(torch.nn.functional.cross_entropy(reader.read([token]), torch.tensor([following])))
    return float(torch.stack(losses).mean().exp())


def llama_cpp() -> Block | None:
    """The same model by llama.cpp, where the extra is installed."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return None
    from wg_blocks.llm_gguf import GGUF

    with progress_bar() as show:
        ModelStore().pull(f"{NAME}-gguf", show)
    return GGUF(checkpoint_ref=f"{NAME}-gguf")


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def measure(tokens: int, rounds: int, text_tokens: int) -> dict[str, Any]:
    with progress_bar() as show:
        ModelStore().pull(NAME, show)
    models = {w or "float32": CausalLM(checkpoint_ref=NAME, weights=w) for w in (None, "int8", "int4")}
    cases: dict[str, Callable[[], float]] = {name: partial(decode_speed, model, tokens) for name, model in models.items()}
    cases["int4_schema"] = partial(decode_speed, models["int4"], tokens, SCHEMA)
    theirs = llama_cpp()
    if theirs is not None:
        cases["llama_cpp"] = partial(decode_speed, theirs, tokens)
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(case())
    speed = {name: round(statistics.median(values), 1) for name, values in found.items()}
    ratios = {f"{name}_over_float32": round(speed[name] / speed["float32"], 2) for name in ("int8", "int4")}
    if "llama_cpp" in speed:
        ratios["int4_over_llama_cpp"] = round(speed["int4"] / speed["llama_cpp"], 2)
        ratios["aim"] = 1.5
    quality = {name: round(perplexity(model, text_tokens), 2) for name, model in models.items()}
    versions = {name: version_of(name) for name in ("torch", "transformers", "onnxruntime", "xllamacpp", "llguidance")}
    return {
        "tokens_per_s": speed, "ratios": ratios, "perplexity": quality, "text_tokens": text_tokens, "rounds": rounds,
        "versions": versions,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=256)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(measure(args.tokens, args.rounds, args.text_tokens)) + "\n")

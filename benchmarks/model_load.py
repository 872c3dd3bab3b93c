"""Load time, prefill and decode speed of a local language model: `python benchmarks/model_load.py [REF]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from wg_blocks.llm_local import CausalLM, load
from wg_blocks.store import ModelStore, progress_bar


def measure(ref: str, dtype: str, tokens: int) -> dict[str, Any]:
    """Seconds and tokens per second; importing torch and transformers is measured apart from loading."""
    with progress_bar() as show:
        folder = ModelStore().pull(ref, show)
    begun = time.perf_counter()
    import torch
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    imported = time.perf_counter()
    load(folder, dtype)
    first = time.perf_counter()
    block = CausalLM(checkpoint_ref=ref, dtype=dtype)
    block.materialize()
    loaded = time.perf_counter()

    def timed(prompt: str, number: int, **extra: Any) -> tuple[float, dict[str, int]]:
        started = time.perf_counter()
        out = block.run({"prompt": prompt, "params": {"max_new_tokens": number, "seed": 1}, **extra})
        return time.perf_counter() - started, out["usage"]

    timed("Hello", 1)
    long, used = timed("The harbour lies between two hills. " * 128, 1)
    short, written = timed("Tell a long story about a harbour town.", tokens)
    item = {"type": "string", "minLength": 60, "maxLength": 60}
    schema = {"type": "array", "items": item, "minItems": 4, "maxItems": 4}
    guided, structured = timed("Write four lines about a harbour as JSON.", 4 * tokens, schema=schema)
    return {
        "ref": ref,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "import_s": round(imported - begun, 2),
        "first_load_s": round(first - imported, 3),
        "load_s": round(loaded - first, 3),
        "prefill_tokens_per_s": round(used["prompt_tokens"] / long),
        "decode_tokens_per_s": round(written["completion_tokens"] / short, 1),
        "schema_decode_tokens_per_s": round(structured["completion_tokens"] / guided, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ref", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(measure(args.ref, args.dtype, args.tokens)) + "\n")

"""Turn a GGUF file into the folder that transformers loads fast: `python convert.py FILE.gguf FOLDER`, prints notes.

It runs as a process of its own: it needs gigabytes and torch, and its caller needs neither. It imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def gguf_to_folder(gguf: Path, folder: Path) -> dict[str, Any]:
    """Dequantize `gguf` to float32 and save weights, config and tokenizer into `folder`; returns notes for the record.

    Tied weights are stored once, the name that is left out stands in the safetensors metadata.
    """
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="float32", **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    owner: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        first = owner.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if first == name:
            kept[name] = tensor.contiguous()
        else:
            aliases[name] = first
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt", **aliases})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"from": "gguf", "to": "safetensors float32", "tied": aliases, "transformers": transformers.__version__}


if __name__ == "__main__":
    notes = gguf_to_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(notes) + "\n")

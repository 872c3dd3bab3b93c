"""A condition from pictures: what a model that looks at them says, or the vector of what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wg_core import Block, Port
from wg_core.assembly.roles import Conditioner
from wg_core.errors import ConfigError


class VLMConditioner(Conditioner):
    """Looks at pictures with the block `vlm` (`{block_type, config}`, as `vlm/api`) and conditions on what it says.

    With the block `embedding` (as `embedding/minilm`) the condition is a tensor float32 [B,1,D], one vector for each
    picture, and `pooled` is [B,D]; without it the condition is the answer: `{text, data?}`, as the model block gives it.
    Both models come from the pool.

    Raises: ConfigError for sub-blocks of other roles, and what they raise.
    """

    ports = (
        Port("input", "in", "image|ref|list", aliases=("image",), description="a picture [B,3,H,W] in 0..1, an artifact, or a list"),
        Port("attention_mask", "in", "tensor", True, description="of token ids; pictures have none"),
        Port("prompt", "in", "text", True, description="what to look for"),
        Port("system", "in", "text", True),
        Port("params", "in", "dict", True),
        Port("schema", "in", "dict", True, description="JSON schema of the answer"),
        *Conditioner.ports[2:],
    )

    def __init__(
        self,
        *,
        vlm: Mapping[str, Any],
        embedding: Mapping[str, Any] | None = None,
        build: Callable[[Mapping[str, Any]], Block],
    ) -> None:
        super().__init__()
        self.vlm = build(vlm)
        self.embedding = build(embedding) if embedding is not None else None
        for name, block in self.get_sub_blocks().items():
            if block.role != name:
                raise ConfigError(f"conditioner/vlm: {name} is a block of role {name!r}, not {block.name!r} ({block.role})")

    def get_sub_blocks(self) -> dict[str, Block]:
        return {"vlm": self.vlm, **({"embedding": self.embedding} if self.embedding is not None else {})}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = {k: inputs[k] for k in ("prompt", "system", "params", "schema") if k in inputs and k in self.vlm.port_index.inputs}
        said = self.vlm.forward({"image": inputs["input"], **given})
        if self.embedding is None:
            return {"embedding": {k: said[k] for k in ("text", "data") if k in said}}
        import torch

        texts = said["text"] if isinstance(said["text"], list) else [said["text"]]
        vectors = self.embedding.forward({"input": texts})["embedding"]
        pooled = torch.as_tensor(vectors, dtype=torch.float32)
        return {"embedding": pooled[:, None], "pooled": pooled}

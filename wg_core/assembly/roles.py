"""Roles: what a block is for. Each role is an abstract block class whose ports are the role's contract.

A concrete block inherits a role's class and so its ports; it may add ports, narrow types and make optional ports
required, but keeps the names. Other words for a port are aliases. Each call advances exactly one step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from wg_core.errors import ConfigError, DuplicateBlockTypeError
from wg_core.execution.agent import ToolSpec
from wg_core.execution.block import Block
from wg_core.structure.port import Port

KNOWN_ROLES: dict[str, type[Block]] = {}

R = TypeVar("R", bound=type[Block])


def register_role(name: str, abstract: R) -> R:
    """Make a role known; its types are `name/...`, its ports those of `abstract`.

    Raises: ConfigError for a bad name or a class that is no block or has another role, DuplicateBlockTypeError.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"bad role name {name!r}: use a lower case letter first, then a-z, 0-9 and '_'")
    given: Any = abstract
    if not (isinstance(given, type) and issubclass(given, Block)):
        raise ConfigError(f"role {name!r}: its contract is a subclass of Block, not {given!r}")
    if abstract.role not in (None, name):
        raise ConfigError(
            f"role {name!r}: class {abstract.__name__} has the role {abstract.role!r}; make both the same"
        )
    if KNOWN_ROLES.setdefault(name, abstract) is not abstract:
        raise DuplicateBlockTypeError(
            f"role {name!r} is known already, as {KNOWN_ROLES[name].__name__}; choose another name"
        )
    abstract.role = name
    return abstract


def role_of(block: Any) -> str | None:
    """The role of a block: its `role`, else the first word of its type if that is a known role, else None."""
    if not isinstance(block, Block):
        return None
    if block.role is not None:
        return block.role
    prefix = (block.block_type or "").partition("/")[0]
    return prefix if prefix in KNOWN_ROLES else None


def role_issues(block: Block) -> list[str]:
    """Where a block breaks the contract of its role, in words; empty if it keeps it (or has no known role)."""
    contract = KNOWN_ROLES.get(role_of(block) or "")
    if contract is None:
        return []
    issues: list[str] = []
    for port in contract.ports:
        own = block.port_index.by_name.get(port.name)
        if own is None and port.direction == "out" and port.optional:
            continue  # an output that is never set may as well be left out
        if own is None or own.name != port.name:
            issues.append(
                f"{block.name}: role {contract.role!r} has the {port.direction}put {port.name!r}; keep its name and list others as aliases"
            )
        elif own.direction != port.direction:
            issues.append(
                f"{block.name}: {port.name!r} is an {own.direction}put but an {port.direction}put of role {contract.role!r}"
            )
        elif "any" not in (*own.types, *port.types) and not set(own.types) & set(port.types):
            issues.append(
                f"{block.name}: {port.name!r} is {'|'.join(own.types)!r}, which role {contract.role!r} ({'|'.join(port.types)!r}) does not know"
            )
    return issues


class Backbone(Block):
    """One pass of a predicting model; knows nothing of time discretisation."""

    role = "backbone"
    ports = (
        Port("latent", "in", "tensor", aliases=("x",)),
        Port("timestep", "in", "tensor|number", aliases=("t",)),
        Port("condition", "in", "tensor|dict", True, "concat", aliases=("context", "emb", "encoder_hidden_states")),
        Port("adapter_features", "in", "tensor|dict", True, "dict"),
        Port("pred", "out", "tensor", aliases=("noise", "x0", "v")),
    )


class Solver(Block):
    """One integration step; owns the noise schedule."""

    role = "solver"
    ports = (
        Port("latent", "in", "tensor", aliases=("x",)),
        Port("timestep", "in", "tensor|number", aliases=("t",)),
        Port("pred", "in", "tensor", aliases=("model_output",)),
        Port("next_latent", "out", "tensor", aliases=("x_next",)),
        Port("next_timestep", "out", "tensor|number", aliases=("t_next",)),
    )


class Codec(Block):
    """Encodes, decodes, or both: each direction whose input is set. Raises: MissingInputError if none is."""

    role = "codec"
    ports = (
        Port("encode_image", "in", "image|tensor", True, aliases=("image", "pixels")),
        Port("decode_latent", "in", "tensor", True),
        Port("encode_latent", "out", "tensor", True),
        Port("decode_image", "out", "image|tensor", True),
    )


class Conditioner(Block):
    """Encodes a raw condition; multimodal ones add optional inputs."""

    role = "conditioner"
    ports = (
        Port("input", "in", "text|tensor|image|dict", aliases=("text", "prompt", "image", "token_ids")),
        Port("attention_mask", "in", "tensor", True),
        Port("embedding", "out", "tensor|dict", aliases=("encoder_hidden_states", "condition")),
        Port("pooled", "out", "tensor", True),
    )


class Tokenizer(Block):
    """Text to token ids [B,L] (int) and back: each direction whose input is set. Raises: MissingInputError if none is."""

    role = "tokenizer"
    ports = (
        Port("text", "in", "text", True, aliases=("input_text", "prompt")),
        Port("decode_token_ids", "in", "tensor", True),
        Port("token_ids", "out", "tensor", True, aliases=("input_ids",)),
        Port("attention_mask", "out", "tensor", True),
        Port("decoded_text", "out", "text", True),
    )


class Adapter(Block):
    """Changes a model from beside: by a signal (`SignalAdapter`) or in its weights (`WeightAdapter`)."""

    role = "adapter"


class SignalAdapter(Adapter):
    """Gives modified activations, or a delta to them, from a condition."""

    ports = (
        Port("condition", "in", "tensor|image|dict", aliases=("control", "style")),
        Port("hidden", "in", "tensor", True, aliases=("activations",)),
        Port("adapted", "out", "tensor|dict", aliases=("output", "delta")),
    )


class WeightAdapter(Adapter):
    """Owns parameters that are attached to modules of another node's block; has no ports and is never called.

    `target` is the id of that node. The graph attaches it as soon as both are there, `managed`: it then works in the
    calls of that graph only. A world attaches it with the places in whose calls it works.
    """

    target: str = ""

    def attach(self, block: Block, *, managed: bool = False, places: Any = None) -> None:
        """Hang on to `block`; doing so again changes nothing. Raises: AdapterError."""
        raise NotImplementedError(f"{type(self).__name__}.attach")

    def detach(self) -> None:
        """Let go of the block; what was learned is kept."""
        raise NotImplementedError(f"{type(self).__name__}.detach")

    def works(self) -> bool:
        """Whether it changes the running call."""
        raise NotImplementedError(f"{type(self).__name__}.works")


class Guidance(Block):
    """Corrects a prediction."""

    role = "guidance"
    ports = (
        Port("pred_cond", "in", "tensor"),
        Port("pred_uncond", "in", "tensor", True),
        Port("scale", "in", "number|tensor", True),
        Port("condition", "in", "tensor|dict", True),
        Port("pred_guided", "out", "tensor"),
    )


class LLM(Block):
    """One completion of a language model, local or remote."""

    role = "llm"
    ports = (
        Port("prompt", "in", "text|list"),
        Port("context", "in", "text|list|dict", True, "concat"),
        Port("system", "in", "text", True),
        Port("params", "in", "dict", True),
        Port("text", "out", "text", aliases=("output", "response"), streamable=True),
        Port("token_ids", "out", "tensor", True),
        Port("usage", "out", "dict", True),
    )


class VLM(Block):
    """An image, and perhaps text, to text or a structured answer."""

    role = "vlm"
    ports = (
        Port("image", "in", "image|ref|list"),
        Port("prompt", "in", "text", True, aliases=("text",)),
        Port("system", "in", "text", True),
        Port("params", "in", "dict", True),
        Port("text", "out", "text", aliases=("output",)),
        Port("data", "out", "dict", True),
    )


class Embedding(Block):
    """A vector (or vectors) for the input."""

    role = "embedding"
    ports = (Port("input", "in", "text|image|list"), Port("embedding", "out", "tensor|list"))


class Agent(Block):
    """One step of an agent: an answer, or calls of tools.

    `tool_calls` is a list of `{call_id, tool_id, arguments}`; without any the step is the last one. An `error` in one says
    what is wrong with it already: it is not run and has that result. With `tool_results`
    (`{call_id, tool_id, result}`, or `error` in place of `result`) the session goes on and the other inputs are those
    that began it. The session is state under `session.*`. `tools` are the ids that it may call, None for all.
    """

    role = "agent"
    tools: Sequence[str] | None = None
    bound: Sequence[ToolSpec] = ()
    agentic = True
    poolable = False
    ports = (
        Port("context", "in", "text|list|dict", aliases=("prompt",)),
        Port("tool_results", "in", "list", True),
        Port("system", "in", "text", True),
        Port("response", "out", "text|dict", True, aliases=("text",)),
        Port("tool_calls", "out", "list", True),
    )

    def bind_tools(self, tools: Sequence[ToolSpec]) -> None:
        """Take the tools that may be called: what each is for and the schema of its arguments. Before the first step."""
        self.bound = list(tools)

    def reset_session(self) -> None:
        """Forget what was said."""


class Tool(Block):
    """Called by an agent, not by edges; ports are free."""

    role = "tool"


class Initializer(Block):
    """The first state of a loop."""

    role = "initializer"
    ports = (
        Port("init_latent", "in", "tensor", True),
        Port("seed", "in", "number", True),
        Port("shape", "in", "list", True),
        Port("latent", "out", "tensor"),
        Port("timestep", "out", "tensor|number"),
    )


class PositionEmbedder(Block):
    """Positions to vectors."""

    role = "position_embedder"
    ports = (Port("indices", "in", "tensor"), Port("embedding", "out", "tensor"))


class Pooler(Block):
    """A sequence to one vector."""

    role = "pooler"
    ports = (Port("sequence", "in", "tensor"), Port("vector", "out", "tensor"))


class Projection(Block):
    """A tensor into another space."""

    role = "projection"
    ports = (Port("tensor", "in", "tensor"), Port("tensor_out", "out", "tensor"))


class Loss(Block):
    """How far a prediction is from its target."""

    role = "loss"
    ports = (Port("prediction", "in", "tensor"), Port("target", "in", "tensor"), Port("loss", "out", "tensor|number"))


class Generator(Block):
    """A whole task behind one call."""

    role = "generator"
    ports = (
        Port("prompt", "in", "text"),
        Port("image", "in", "image|ref", True),
        Port("image_out", "out", "image|ref"),
    )


class Speech(Block):
    """A text, said; `audio` is `{waveform, sample_rate}`."""

    role = "speech"
    ports = (
        Port("text", "in", "text", aliases=("prompt",)),
        Port("params", "in", "dict", True),
        Port("audio", "out", "audio"),
    )


class Transcription(Block):
    """What is said in a recording, `{waveform, sample_rate}`."""

    role = "transcription"
    ports = (
        Port("audio", "in", "audio"),
        Port("prompt", "in", "text", True),
        Port("text", "out", "text", aliases=("output",)),
    )


for _abstract in (
    Backbone, Solver, Codec, Conditioner, Tokenizer, Adapter, Guidance, LLM, VLM, Embedding, Agent, Tool, Initializer,
    PositionEmbedder, Pooler, Projection, Loss, Generator, Speech, Transcription,
):  # fmt: skip
    if _abstract.role is not None:
        register_role(_abstract.role, _abstract)

"""Llama with weights of 4 or 8 bits, read by ONNX Runtime: less memory and a multiple of the speed on a CPU.

Weights are whole numbers in blocks of 32 along the inputs, in the forms of GGUF's Q8_0 (w = scale * q, q in -127..127)
and Q4_1 (w = scale * q + low, q in 0..15), so weights that come from such a file stay what they are
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Inputs are rounded to 8 bits, block by block, in each
product. Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. This module imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from wg_blocks.reading import RoomReader
from wg_core.errors import ConfigError

BLOCK = 32
_MS = "com.microsoft"
_TYPES = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}
_AT = {"first": 0, "end": -1}  # axes and indices
_ROTARY = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the length of the text


class Packed(nn.Module):
    """The weight of a linear layer [outputs, inputs] in `bits` bits: `codes`, `scale` and, for 4 bits, `low`."""

    codes: Tensor
    scale: Tensor
    low: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.bits = bits
        blocks = weight.detach().float().view(self.outputs, self.inputs // BLOCK, BLOCK)
        if bits == 8:
            scale = (blocks.abs().amax(-1) / 127).clamp(min=1e-12)
            codes = (blocks / scale[..., None]).round() + 128
        else:
            low = blocks.amin(-1)
            scale = ((blocks.amax(-1) - low) / 15).clamp(min=1e-12)
            codes = ((blocks - low[..., None]) / scale[..., None]).round().clamp(0, 15)
            self.register_buffer("low", low)
        codes = codes.to(torch.uint8)
        self.register_buffer("codes", codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4))
        self.register_buffer("scale", scale)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the weight, as numbers."""
        codes, scale = self.codes[ids], self.scale[ids][..., None]
        if self.bits == 8:
            return ((codes.float() - 128) * scale).flatten(-2)
        numbers = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
        return (numbers * scale + self.low[ids][..., None]).flatten(-2)


class _Layer(nn.Module):
    def __init__(self, layer: Any, bits: int) -> None:
        super().__init__()
        at, mlp = layer.self_attn, layer.mlp
        self.register_buffer("norm_in", layer.input_layernorm.weight.detach().float().clone())
        self.register_buffer("norm_mid", layer.post_attention_layernorm.weight.detach().float().clone())
        self.qkv = Packed(torch.cat([at.q_proj.weight, at.k_proj.weight, at.v_proj.weight]), bits)
        self.o = Packed(at.o_proj.weight, bits)
        self.gate_up = Packed(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), bits)
        self.down = Packed(mlp.down_proj.weight, bits)


class PackedLlama(nn.Module):
    """The weights of a `LlamaForCausalLM` in 4 or 8 bits (embeddings and output layer in 8); `reader()` reads with them.

    Raises: ConfigError for another model, or one with parts that are not known here.
    """

    cos: Tensor
    sin: Tensor
    norm: Tensor

    def __init__(self, model: Any, bits: int) -> None:
        super().__init__()
        self.config, self.generation_config = model.config, model.generation_config
        _must_fit(model, bits)
        first = model.model.layers[0].self_attn
        self.head_size, self.factor = first.head_dim, first.scaling
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        self.head = Packed(model.lm_head.weight, 8)
        self.embedding = None if tied else Packed(model.model.embed_tokens.weight, 8)
        self.layers = nn.ModuleList(_Layer(layer, bits) for layer in model.model.layers)
        self.register_buffer("norm", model.model.norm.weight.detach().float().clone())
        places = torch.arange(self.config.max_position_embeddings)[None]
        for name, angles in zip(("cos", "sin"), model.model.rotary_emb(torch.zeros(1), places), strict=True):
            self.register_buffer(name, angles[0, :, : self.head_size // 2].contiguous(), persistent=False)
        self._session: tuple[tuple[int, ...], onnxruntime.InferenceSession] | None = None

    def embed(self, ids: Sequence[int]) -> Tensor:
        """The embeddings of tokens, [tokens, hidden size]."""
        return (self.embedding or self.head).rows(torch.tensor(ids))

    def reader(self) -> PackedReader:
        """What reads tokens with these weights."""
        return PackedReader(self, self.session())

    def session(self) -> onnxruntime.InferenceSession:
        """The network in ONNX Runtime, made anew when weights were written."""
        written = tuple(buffer._version for buffer in self.buffers())
        if self._session is None or self._session[0] != written:
            self._session = written, _Network(self).session()
        return self._session[1]


def _must_fit(model: Any, bits: int) -> None:
    from transformers import LlamaForCausalLM

    kind, config = type(model).__name__, model.config
    if type(model) is not LlamaForCausalLM:
        raise ConfigError(f"weights: int{bits} are for models of the class LlamaForCausalLM, not {kind}; leave weights out")
    first = model.model.layers[0].self_attn
    sizes = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)}
    wrong = [
        *(f"inputs of size {size}, which is no multiple of {BLOCK}" for size in sorted(sizes) if size % BLOCK),
        *([f"heads of size {first.head_dim}, which is no multiple of 16"] if first.head_dim % 16 else []),
        *(["biases"] if config.attention_bias or config.mlp_bias else []),
        *([f"hidden_act {config.hidden_act!r}"] if config.hidden_act not in ("silu", "swish") else []),
        *([f"rope_type {rope!r}"] if (rope := model.model.rotary_emb.rope_type) not in _ROTARY else []),
    ]
    if wrong:
        raise ConfigError(f"weights: int{bits} do not go with this model: it has {'; '.join(wrong)}; leave weights out")


class _Network:
    """The ONNX graph of a `PackedLlama`; its weights stay where they are in memory.

    Inputs: `x` [tokens, hidden size], `last` and `size` (number of all tokens less one, and that number), and for each
    layer the room for keys and values, [1, heads of keys, room, head size]; outputs: `scores` [1, rows], and that room.
    """

    def __init__(self, model: PackedLlama) -> None:
        self.model = model
        self._nodes: list[Any] = []
        self._held: dict[str, Tensor] = {}
        self._sums: dict[Any, str] = {}

    def _constant(self, value: Tensor) -> str:
        name = f"c{len(self._held)}"
        self._held[name] = value.detach().contiguous()
        return name

    def _op(self, kind: str, *inputs: str, outputs: int | Sequence[str] = 1, ms: bool = False, **words: Any) -> Any:
        at = len(self._nodes)
        names = [f"t{at}_{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(kind, list(inputs), names, domain=_MS if ms else "", **words))
        return names if len(names) > 1 else names[0]

    def _linear(self, x: str, weight: Packed, name: str | None = None) -> str:
        """x W^T; what 4 bits have below their middle is a product with the sums of the inputs of each block."""
        words = {"K": weight.inputs, "N": weight.outputs, "bits": weight.bits, "block_size": BLOCK, "accuracy_level": 4}
        given = (x, self._constant(weight.codes), self._constant(weight.scale.flatten()))
        y = self._op("MatMulNBits", *given, outputs=[name] if name else 1, ms=True, **words)
        if weight.bits == 8:
            return y
        if weight.inputs not in self._sums:
            number = weight.inputs // BLOCK
            self._sums[weight.inputs] = self._constant(torch.eye(number).repeat_interleave(BLOCK, 0))
        sums = self._op("MatMul", x, self._sums[weight.inputs])
        middle = self._constant(weight.low + 8 * weight.scale)
        return self._op("Gemm", sums, middle, y, transB=1)

    def _norm(self, x: str, more: str | None, weight: Tensor) -> tuple[str, str]:
        """(root mean square norm of x + more, x + more)."""
        epsilon = self.model.config.rms_norm_eps
        if more is None:
            return self._op("SimplifiedLayerNormalization", x, self._constant(weight), axis=-1, epsilon=epsilon), x
        given = (x, more, self._constant(weight))
        normed, _, _, total = self._op("SkipSimplifiedLayerNormalization", *given, outputs=4, ms=True, epsilon=epsilon)
        return normed, total

    def _graph(self) -> None:
        model, config = self.model, self.model.config
        cos, sin = self._constant(model.cos), self._constant(model.sin)
        heads = {"num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads}
        x, more = "x", None
        for i, layer in enumerate(model.layers):
            h, x = self._norm(x, more, layer.norm_in)
            qkv = self._op("Unsqueeze", self._linear(h, layer.qkv), "first")
            given = (qkv, "", "", f"keys{i}", f"values{i}", "last", "size", cos, sin)
            mixed, *_ = self._op(
                "GroupQueryAttention", *given, outputs=[f"mixed{i}", f"keys{i}_now", f"values{i}_now"], ms=True,
                do_rotary=1, rotary_interleaved=0, scale=model.factor, **heads,
            )  # fmt: skip
            h, x = self._norm(x, self._linear(self._op("Squeeze", mixed, "first"), layer.o), layer.norm_mid)
            gate, up = self._op("Split", self._linear(h, layer.gate_up), outputs=2, axis=-1, num_outputs=2)
            silu = self._op("QuickGelu", gate, ms=True, alpha=1.0)
            more = self._linear(self._op("Mul", silu, up), layer.down)
        h, _ = self._norm(x, more, model.norm)
        self._linear(self._op("Gather", h, "end", axis=0), model.head, "scores")

    def session(self) -> onnxruntime.InferenceSession:
        self._graph()
        config, info = self.model.config, helper.make_tensor_value_info
        room = [1, config.num_key_value_heads, "room", self.model.head_size]
        kept = [f"{what}{i}" for i in range(len(self.model.layers)) for what in ("keys", "values")]
        inputs = [
            info("x", TensorProto.FLOAT, ["tokens", config.hidden_size]),
            *(info(name, TensorProto.INT32, [1]) for name in ("last", "size")),
            *(info(name, TensorProto.FLOAT, room) for name in kept),
        ]
        outputs = [
            info("scores", TensorProto.FLOAT, [1, self.model.head.outputs]),
            *(info(f"{name}_now", TensorProto.FLOAT, room) for name in kept),
        ]
        graph = helper.make_graph(self._nodes, "llama", inputs, outputs, [_elsewhere(*held) for held in self._held.items()])
        graph.initializer.extend(helper.make_tensor(name, TensorProto.INT64, [1], [at]) for name, at in _AT.items())
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_MS, 1)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in self._held.values()]
        options.add_external_initializers(list(self._held), values)
        return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _elsewhere(name: str, value: Tensor) -> onnx.TensorProto:
    """The declaration of a tensor that is given beside the graph."""
    tensor = onnx.TensorProto(name=name, data_type=_TYPES[value.dtype], dims=value.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="memory")
    return tensor


class PackedReader(RoomReader):
    """Reads one sequence by ONNX Runtime, which writes keys and values into the room."""

    def __init__(self, model: PackedLlama, session: onnxruntime.InferenceSession) -> None:
        super().__init__(model)
        self._run = session
        self._binding = session.io_binding()

    def _bind(self, name: str, value: Tensor, *, out: bool = False) -> None:
        kind = np.int32 if value.dtype == torch.int32 else np.float32
        bind = self._binding.bind_output if out else self._binding.bind_input
        bind(name, "cpu", 0, kind, tuple(value.shape), value.data_ptr())

    def new_room(self, tokens: int) -> Tensor:
        heads = self.model.config.num_key_value_heads
        room = torch.zeros(len(self.model.layers), 2, 1, heads, tokens, self.model.head_size)
        for i, pair in enumerate(room):
            for name, kept in zip((f"keys{i}", f"values{i}"), pair, strict=True):
                self._bind(name, kept)
                self._bind(f"{name}_now", kept, out=True)
        return room

    def read(self, ids: Sequence[int], *, scores: bool = True) -> Any:
        end = self._at + len(ids)
        self._make_room(end)
        x, found = self.model.embed(ids), torch.empty(1, self.model.head.outputs)
        last, size = (torch.tensor([number], dtype=torch.int32) for number in (end - 1, end))
        for name, value in (("x", x), ("last", last), ("size", size)):
            self._bind(name, value)
        self._bind("scores", found, out=True)
        self._run.run_with_iobinding(self._binding)
        self._at = end
        return found if scores else None

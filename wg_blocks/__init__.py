"""What blocks do: one file per role or family."""

from __future__ import annotations

from typing import Any

BLOCKS = {
    "llm/hf": "wg_blocks.llm_local:CausalLM",
    "llm/fake": "wg_blocks.llm_fake:FakeLLM",
    "llm/api": "wg_blocks.api.llm:ApiLLM",
    "llm/openai": "wg_blocks.api.llm:OpenAILLM",
    "llm/anthropic": "wg_blocks.api.llm:AnthropicLLM",
    "vlm/api": "wg_blocks.api.vlm:ApiVLM",
    "embedding/minilm": "wg_blocks.embedding_local:SentenceEmbedding",
    "embedding/api": "wg_blocks.api.embedding:ApiEmbedding",
    "generator/api": "wg_blocks.api.image:ApiImage",
    "speech/api": "wg_blocks.api.speech:ApiSpeech",
    "transcription/api": "wg_blocks.api.transcription:ApiTranscription",
    "text/template": "wg_blocks.text:Template",
    "world/context": "wg_blocks.text:Context",
    "image/terrain": "wg_blocks.terrain:TerrainDiffusion",
    "image/relief": "wg_blocks.terrain:Relief",
    "image/enlarge": "wg_blocks.enlarge:Enlarge",
    "map/measure": "wg_blocks.maps:MeasureMap",
    "describe/items": "wg_blocks.describe:DescribeItems",
    "graph/ref": "wg_blocks.graph_ref:GraphRef",
    "pipeline/ref": "wg_blocks.graph_ref:PipelineRef",
    "maker/dispatch": "wg_blocks.maker:Dispatch",
    "backbone/toy": "wg_blocks.toy:ToyBackbone",
    "codec/toy": "wg_blocks.toy:ToyCodec",
    "conditioner/vlm": "wg_blocks.vlm_conditioner:VLMConditioner",
    "conditioner/toy": "wg_blocks.toy:ToyConditioner",
    "tokenizer/bytes": "wg_blocks.tokens:ByteTokenizer",
    "initializer/noise": "wg_blocks.sampling:Noise",
    "solver/euler": "wg_blocks.sampling:Euler",
    "solver/heun": "wg_blocks.sampling:Heun",
    "solver/ddim": "wg_blocks.sampling:DDIM",
    "guidance/cfg": "wg_blocks.sampling:ClassifierFree",
    "adapter/lora": "wg_blocks.lora:LoRA",
    "text/prefix": "wg_blocks.prefix:TextPrefix",
    "projection/head": "wg_blocks.head:OutputHead",
    "agent/scripted": "wg_blocks.agent_scripted:ScriptedAgent",
    "agent/llm": "wg_blocks.agent_llm:LLMAgent",
    "agent/api": "wg_blocks.agent_api:ApiAgent",
    "agent/react": "wg_blocks.agent_react:ReActAgent",
    "tool/search_content": "wg_blocks.world_tools:SearchContent",
    "tool/read_entity": "wg_blocks.world_tools:ReadEntity",
    "tool/read_chronicle": "wg_blocks.world_tools:ReadChronicle",
    "tool/quote_end_world": "wg_blocks.world_tools:QuoteEndWorld",
    "tool/echo": "wg_blocks.tools:Echo",
    "tool/calc": "wg_blocks.tools:Calculator",
    "backbone/identity": "wg_blocks.stubs:IdentityBackbone",
    "solver/identity": "wg_blocks.stubs:IdentitySolver",
    "codec/identity": "wg_blocks.stubs:IdentityCodec",
    "conditioner/identity": "wg_blocks.stubs:IdentityConditioner",
    "tokenizer/identity": "wg_blocks.stubs:IdentityTokenizer",
    "adapter/identity": "wg_blocks.stubs:IdentityAdapter",
    "guidance/identity": "wg_blocks.stubs:IdentityGuidance",
    "llm/identity": "wg_blocks.stubs:IdentityLLM",
    "vlm/identity": "wg_blocks.stubs:IdentityVLM",
    "embedding/identity": "wg_blocks.stubs:IdentityEmbedding",
    "agent/identity": "wg_blocks.stubs:IdentityAgent",
    "initializer/identity": "wg_blocks.stubs:IdentityInitializer",
}


def register(registry: Any) -> None:
    """Register all block types and transports of this package; each class is imported at its first use."""
    for block_type, factory in BLOCKS.items():
        registry.register(block_type, factory)
        behind_api = factory if ".api." in factory else BLOCKS.get(f"{block_type.split('/')[0]}/api")
        if behind_api is not None:
            registry.register(block_type, behind_api, backend="api")
    registry.register("llm/hf", "wg_blocks.llm_gguf:GGUF", backend="llama_cpp")
    registry.register_transport("http", "wg_blocks.remote:HttpTransport")

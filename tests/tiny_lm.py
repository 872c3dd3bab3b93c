"""A tiny real language model: two layers, random weights, a tokenizer trained on the spot."""

from __future__ import annotations

from pathlib import Path

LINES = [
    "The harbour town sleeps while the lamp keeper counts the ships.",
    "A storm lands at night and the ferry waits for the tide.",
    '{"narrative": "The old bell rings.", "changes": [{"op": "add", "kind": "place", "id": "pier"}]}',
    "Numbers such as 0, 1, 2, 3.5 and -40 are written by people and machines.",
    "true false null [] {} : , the quick brown fox jumps over the lazy dog",
]
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def save_tiny_lm(folder: Path, *, chat: bool = True, seed: int = 0, heads: int = 4) -> Path:
    """Build the model and save it to `folder` as transformers does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>"
    )
    if chat:
        fast.chat_template = CHAT
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(fast) + 5,  # more rows than tokens, as published models have
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder

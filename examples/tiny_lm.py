"""A language model made on the spot: a Llama of two layers with a tokenizer of its own, saved as transformers does."""

from __future__ import annotations

from pathlib import Path

CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make(folder: Path, lines: list[str], seed: int = 0) -> Path:
    """Untrained weights, and byte pairs learned from `lines`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    marks, letters = ["<|pad|>", "<|start|>", "<|end|>"], pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=letters, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=marks[0], bos_token=marks[1], eos_token=marks[2])
    tokenizer.chat_template = CHAT
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(block, examples: list[dict], steps: int) -> list[float]:
    """The losses of a plain torch loop over `block.answer_loss`."""
    import torch

    optimizer = torch.optim.AdamW(block.trainable_parameters(), lr=4e-3)
    losses = []
    for _ in range(steps):
        loss, _ = block.answer_loss(examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

"""Sentence embeddings on this machine: a BERT encoder, mean pooling, vectors of length 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wg_blocks.published import Published
from wg_core import Port
from wg_core.errors import ConfigError, MissingExtraError, PortValueError

if TYPE_CHECKING:
    from torch import nn

BATCH = 32


class SentenceEmbedding(Published):
    """A vector of length 1 for a text (float32 [D]), or for each text of a list ([N,D]); near texts have near vectors.

    `checkpoint_ref` is a name of the model store, a ref or a folder with a BERT encoder; it loads at the first call. A
    text counts up to its first `max_tokens` tokens. Tokens' states are averaged and the mean is scaled to length 1
    (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084).

    Raises: PortValueError for what is no text, MissingModelError with the command that fetches the model.
    """

    role = "embedding"
    ports = (Port("input", "in", "text|list"), Port("embedding", "out", "tensor"))

    def __init__(self, *, checkpoint_ref: str = "minilm-l6-v2", max_tokens: int = 256) -> None:
        super().__init__()
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or not 3 <= max_tokens <= 512:
            raise ConfigError(f"embedding/minilm: max_tokens is 3 to 512, not {max_tokens!r}")
        self.checkpoint_ref = checkpoint_ref
        self.max_tokens = max_tokens
        self._tokenizer: Any = None

    def build_modules(self) -> Mapping[str, nn.Module]:
        try:
            from transformers import AutoConfig, BertModel
            from transformers.utils import logging
        except ImportError as error:
            raise MissingExtraError("embedding/minilm needs torch and transformers: pip install torch transformers") from error
        from wg_blocks.llm_local import load_tokenizer, set_threads

        set_threads()
        folder = self.folder()
        bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # that a published pooler is left out is no news
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if self._read_weights:
                more: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "add_pooling_layer": False}
                encoder: Any = BertModel.from_pretrained(folder, config=config, **more)
            else:
                encoder = BertModel(config, add_pooling_layer=False)
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        self._tokenizer = load_tokenizer(folder)
        return {"encoder": encoder.eval()}

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        given = inputs["input"]
        texts: list[str] = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise PortValueError(f"{self.name}: input is a text or a list of texts")
        encoder: Any = self.modules["encoder"]
        if not texts:
            return {"embedding": torch.zeros(0, encoder.config.hidden_size)}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # near lengths together: little padding
        vectors: list[Any] = [None] * len(texts)
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            batch = self._tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(encoder.device)
            mask = batch["attention_mask"].unsqueeze(-1)
            states = encoder(**batch).last_hidden_state * mask
            means = torch.nn.functional.normalize(states.sum(1) / mask.sum(1).clamp(min=1), dim=1)
            for i, vector in zip(some, means, strict=True):
                vectors[i] = vector
        found = torch.stack(vectors)
        return {"embedding": found[0] if isinstance(given, str) else found}

"""How surprising a text is to a causal language model on disk."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groundkern.trainer.config import ConfigError

WINDOW = 1024  # tokens seen at once, if the model can


class Perplexity:
    """exp of the mean negative log-likelihood of a text's tokens, in windows that do not overlap.

    The first token of the text counts if the tokenizer has a token that begins a text.

    Args:
        path: folder with model and tokenizer; loaded in float32 on the CPU.

    Raises:
        ConfigError: they cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        options = {"local_files_only": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
            self.model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, **options
            ).eval()
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path}: expected a causal language model ({reason})") from None
        longest = getattr(self.model.config, "max_position_embeddings", WINDOW)
        self.window = min(WINDOW, longest)

    @torch.no_grad()
    def __call__(self, text: str) -> float:
        """The perplexity; infinite for a text without a token to predict."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        ids = ids if begin is None else [begin, *ids]
        total, count = 0.0, 0
        for start in range(0, len(ids) - 1, self.window - 1):
            window = torch.tensor([ids[start : start + self.window]])
            logits = self.model(input_ids=window, use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.float(), window[0, 1:], reduction="sum"
            ).item()
            count += window.shape[1] - 1
        return math.exp(min(total / count, 700.0)) if count else math.inf


@cache
def scorer(path: Path) -> Perplexity:
    """`Perplexity`, loaded once per process."""
    return Perplexity(path)

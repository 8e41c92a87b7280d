"""A model and its tokenizer as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.models import Critic
from ppomax.models.trunk import config_as_given
from ppomax.saving.beside import beside


def save_model(model: PreTrainedModel | Critic, tokenizer: PreTrainedTokenizerBase | None, path: str | Path) -> Path:
    """Write a HF directory (safetensors, config, the tokenizer if there is one) that the Auto classes load; returns the
    path.

    A folder of that name is replaced, and is never half a model."""
    path = Path(path)
    hf = model.model if isinstance(model, Critic) else model
    with beside(path) as part, config_as_given(hf):
        hf.save_pretrained(part, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return path

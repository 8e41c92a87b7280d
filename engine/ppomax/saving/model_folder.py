"""A model and its tokenizer as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppomax.models.critic import Critic


def save_model(model: PreTrainedModel | Critic, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Path:
    """Write a HF directory (safetensors, config, tokenizer) that the Auto classes load; returns the path.

    Written beside its place and renamed, so that a folder of that name is never half a model. An existing folder is
    replaced."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    hf = model.model if isinstance(model, Critic) else model
    hf.save_pretrained(part, safe_serialization=True)
    tokenizer.save_pretrained(part)
    if path.exists():
        shutil.rmtree(path)
    os.replace(part, path)
    return path

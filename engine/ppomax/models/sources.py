"""Where models and tokenizers are read from: a folder, a hub name, or a model in memory; and the device they go to."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ModelSource = str | Path | PreTrainedModel


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained(path); data.check_tokenizer says whether it is fit for PPO."""
    return AutoTokenizer.from_pretrained(local_or_hub(path), trust_remote_code=trust_remote_code)


def local_or_hub(path: str | Path) -> str:
    """A folder that exists, or a hub name (owner/name); anything else is a mistyped path and is named as such."""
    text = str(path)
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file() and not (Path(text) / "tokenizer_config.json").is_file():
            raise FileNotFoundError(
                f"{text} holds neither config.json nor tokenizer_config.json; give a HF model folder"
            )
        return text
    looks_like_hub_name = text.count("/") <= 1 and not text.startswith((".", "/", "~"))
    if not looks_like_hub_name:
        raise FileNotFoundError(
            f"no model folder {text}; give a folder with config.json and model.safetensors, or a hub name"
        )
    return text


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)

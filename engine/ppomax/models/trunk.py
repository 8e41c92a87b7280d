"""A model without its head: the base model and its decoder blocks, whatever the family calls them."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The trunk without its head (`model.base_model`): what gives hidden states."""
    base: PreTrainedModel = model.base_model  # type: ignore[assignment]
    if base is model and hasattr(model, "lm_head"):
        raise ValueError(f"{type(model).__name__} has no separate base model; use a *ForCausalLM of transformers")
    return base


def blocks_name(base: PreTrainedModel) -> str:
    """Name of the list of decoder blocks in a base model: `layers`, `h` ..., found by its length."""
    depth = base.config.num_hidden_layers
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name
    raise ValueError(
        f"{type(base).__name__} has no list of {depth} blocks (config.num_hidden_layers) among its direct children; "
        "use a decoder-only model whose base model holds its blocks"
    )


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a causal LM, bottom first, whatever its family calls them."""
    base = base_of(model)
    return getattr(base, blocks_name(base))  # type: ignore[no-any-return]


def nested_blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The same for models that hold their blocks deeper inside, such as OPT, which can be counted but not taken
    apart: the longest list of modules."""
    lists = [m for m in base_of(model).modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def with_blocks(config: Any, part: slice) -> Any:
    """A copy of a HF configuration for the decoder blocks `part` alone: their number, and their types where the
    configuration lists them."""
    cut = copy.copy(config)
    cut.num_hidden_layers = len(range(config.num_hidden_layers)[part])
    if getattr(config, "layer_types", None):
        cut.layer_types = config.layer_types[part]
    return cut


def window_of(config: Any) -> float:
    """Most tokens of a sequence (config.max_position_embeddings); infinity where the configuration names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding (V, D), which is the head's weight too where the two are tied."""
    return model.get_input_embeddings().weight  # type: ignore[return-value]


def freeze(model: nn.Module) -> nn.Module:
    """Turn gradients off and evaluation mode on, in place; returns the model."""
    return model.requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, in modules and in the config (where attention dropout lives)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)

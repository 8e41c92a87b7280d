"""A model without its head: the base model and its decoder blocks, whatever the family calls them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The trunk without its head: what gives hidden states. `model.base_model`; or the decoder that it hands everything
    to, as OPT's does (`check_head` holds what comes of it against the model's own logits)."""
    base: PreTrainedModel = model.base_model  # type: ignore[assignment]
    if base is model and hasattr(model, "lm_head"):
        raise ValueError(f"{type(model).__name__} has no separate base model; use a *ForCausalLM of transformers")
    if _blocks_in(base) is None:
        inner = [m for m in base.children() if isinstance(m, PreTrainedModel) and _blocks_in(m) is not None]
        return inner[0] if len(inner) == 1 else base
    return base


def blocks_name(base: PreTrainedModel) -> str:
    """Name of the list of decoder blocks in a base model: `layers`, `h` ..., found by its length."""
    name = _blocks_in(base)
    if name is None:
        depth = base.config.num_hidden_layers
        raise ValueError(
            f"{type(base).__name__} has no list of {depth} blocks (config.num_hidden_layers) among its direct "
            "children; use a decoder-only model whose base model holds its blocks"
        )
    return name


def _blocks_in(base: PreTrainedModel) -> str | None:
    depth = getattr(base.config, "num_hidden_layers", None)
    lists = ((name, m) for name, m in base.named_children() if isinstance(m, nn.ModuleList))
    return next((name for name, m in lists if len(m) == depth), None)


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
        try:
            cut.layer_types = config.layer_types[part]
        except AttributeError:
            raise ValueError(
                f"{type(config).__name__} works its layer types out by itself, so a part of its blocks cannot be "
                "described; use model.train: full or lora"
            ) from None
    return cut


def window_of(config: Any) -> float:
    """Most tokens of a sequence: config.max_position_embeddings, infinity where the configuration names no limit. Under
    LongRoPE its original window: beyond that the family turns all positions of a forward by other factors, those of
    shorter sequences beside it too, so that a log-prob would depend on its neighbours."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    windows = [getattr(text, "max_position_embeddings", None)]
    for rope in (ropes, *ropes.values()):  # of all layers, or of each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            windows.append(original or getattr(text, "original_max_position_embeddings", None))
    return min((w for w in windows if w), default=math.inf)


def window_words(config: Any) -> str:
    """The window for an error message, and where it is from."""
    text, window = config.get_text_config(), window_of(config)
    whole = getattr(text, "max_position_embeddings", None)
    source = "config.max_position_embeddings" if window == whole else f"LongRoPE's original one; {whole} is not served"
    return f"the model's window of {window} tokens ({source})"


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding (V, D), which is the head's weight too where the two are tied."""
    return model.get_input_embeddings().weight  # type: ignore[return-value]


def freeze(model: nn.Module) -> nn.Module:
    """Turn gradients off and evaluation mode on, in place; returns the model."""
    return model.requires_grad_(False).eval()


def train_as_scored(model: PreTrainedModel) -> None:
    """Have a forward in training be the one of evaluation, and train all of the embedding: every dropout probability is
    0, in modules and in the config (where attention dropout lives), and no row is left out as `padding_idx`, which may
    be the EOS token's. `config_as_given` gives the config's own values back."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _dropouts_in(vars(module)):
            setattr(module, name, 0.0)
    given: dict[str, float] = getattr(model, "_dropout_given", {})
    for name in _dropouts_in(vars(model.config)):
        given.setdefault(name, getattr(model.config, name))
        setattr(model.config, name, 0.0)
    model._dropout_given = given  # type: ignore[assignment]
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def _dropouts_in(named: Mapping[str, Any]) -> list[str]:
    """`attention_dropout`, `resid_pdrop`, `layerdrop` ...: what families call a chance of leaving something out."""
    return [name for name, value in named.items() if "drop" in name and isinstance(value, float)]


@contextmanager
def config_as_given(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's config has the dropout that it came with: what is saved is the user's."""
    given: dict[str, float] = getattr(model, "_dropout_given", {})
    for name, value in given.items():
        setattr(model.config, name, value)
    try:
        yield
    finally:
        for name in given:
            setattr(model.config, name, 0.0)

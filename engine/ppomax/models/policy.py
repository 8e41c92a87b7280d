"""Policies and references: causal language models from Hugging Face checkpoints, dropout off, head checked.

Left out on purpose: encoder-decoders, files of quantised weights (frozen_bits.py makes them). Adapters: adapters.py;
top blocks alone: branch.py."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from ppomax.models.head import check_head
from ppomax.models.partitioned import gathered, in_parts, load_partitioned
from ppomax.models.sources import ModelSource, read_whole
from ppomax.models.trunk import train_as_scored


def load_policy(
    source: ModelSource,
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
    zero: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal LM from a HF directory, a hub name or a model in memory (cast in place), dropout off, head checked.

    Dropout is set to zero for good: with it the update's log-probs would not equal the rollout's. `options` go to
    from_pretrained (attn_implementation, device_map ...). Weights are read from safetensors only. `zero`: the DeepSpeed
    settings of a model that is read into ZeRO-3's partitions, each rank its own (partitioned.py).
    """
    if isinstance(source, PreTrainedModel):
        model = source.to(dtype)  # type: ignore[arg-type]
    elif zero is not None and in_parts(source):
        model = load_partitioned(source, dtype, settings=zero)
    else:
        model = read_whole(AutoModelForCausalLM, source, dtype, trust_remote_code=trust_remote_code, **options)
    if model.config.is_encoder_decoder:
        raise ValueError(f"load_policy: {type(model).__name__} is an encoder-decoder; a decoder-only model is wanted")
    train_as_scored(model)
    with gathered(model):
        check_head(model)
    return model

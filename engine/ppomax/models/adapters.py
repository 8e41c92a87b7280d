"""LoRA on a causal LM, by PEFT: W x becomes W x + alpha/rank * B A x, with B = 0 at the start.

The model stays the HF model that it was (transformers' own adapter mixin), its weights frozen, its adapters trained.
The reference is the same model with the adapters off, so no second copy exists and the first KL is 0 to the bit.
Adapters stay unmerged while sampling: merging and unmerging would round the frozen weights. No dropout, since the
update's logprobs must equal the rollout's. Left out on purpose: adapters on the embeddings or the head, whose weights
the fused losses read directly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppomax.models.frozen_bits import nothing_fetched
from ppomax.models.partitioned import gathered
from ppomax.models.trunk import blocks_of
from ppomax.sharding import Lazy


class AdapterKnobs(Protocol):
    """The knobs of adapters, which several configurations have."""

    @property
    def lora_rank(self) -> int: ...

    @property
    def lora_alpha(self) -> float: ...

    @property
    def lora_targets(self) -> tuple[str, ...] | None: ...


def add_adapters(model: PreTrainedModel, config: AdapterKnobs, *, seed: int = 0) -> None:
    """Freeze `model` and give it trainable adapters as `config` says; `seed` fixes their start.

    ModuleNotFoundError if PEFT is missing, ValueError if a target names no linear layer of the blocks."""
    try:
        with nothing_fetched():  # PEFT imports bitsandbytes where it is installed
            from peft import LoraConfig
    except ImportError as error:
        raise ModuleNotFoundError(
            "train: lora needs PEFT, which is not installed; pip install 'ppomax[lora]'"
        ) from error
    chosen = chosen_layers(model, config)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules=list(chosen),
        fan_in_fan_out=isinstance(
            next(iter(chosen.values())), Conv1D
        ),  # GPT-2's linear layers hold their weight transposed
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(), nothing_fetched():
        torch.manual_seed(seed)
        model.add_adapter(lora)
    model.eval()


def chosen_layers(model: PreTrainedModel, config: AdapterKnobs) -> dict[str, Any]:
    """The linear layers that get an adapter, by their full names. ValueError if a target is none."""
    layers = linear_layers(model)
    known = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for target in config.lora_targets or ():
        if not any(name == target or name.endswith("." + target) for name in layers):
            raise ValueError(
                f"lora_targets: {target!r} is no linear layer of {type(model).__name__}'s blocks (known: "
                f"{', '.join(known)}); name some of those, or leave it null for all"
            )
    wanted = config.lora_targets or known
    return {n: m for n, m in layers.items() if any(n == t or n.endswith("." + t) for t in wanted)}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers inside the decoder blocks, by their full names."""
    inside = {id(m) for block in blocks_of(model) for m in block.modules()}
    return {n: m for n, m in model.named_modules() if id(m) in inside and isinstance(m, (nn.Linear, Conv1D))}


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` is the model that it was before `add_adapters`. For forwards without gradients."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was called on it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def merged_weights(model: PreTrainedModel, weights: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, Lazy]]:
    """`weights`, all of the adapted `model`'s by name, as a plain HF model names and holds them: W + alpha/rank * B A
    in place of each adapted layer's W. Also the adapters alone.

    A layer's weights are made whole as its tensor is asked for, and dropped: no more than one layer is whole at a time,
    and nothing of the model is changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    plain: dict[str, Lazy] = {}
    adapters: dict[str, Lazy] = {}
    for name, x in weights.items():
        owner, inside, key = name.partition(".base_layer.")
        if inside:
            plain[f"{owner}.{key}"] = replace(x, get=partial(_merged, adapted[owner])) if key == "weight" else x
        else:
            ours = any(name.startswith(f"{layer}.") for layer in adapted)
            (adapters if ours else plain)[name] = x
    return plain, adapters


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """What PEFT's own merge puts in the weight's place."""
    with gathered(layer):
        weight: Tensor = layer.base_layer.weight.detach()
        return weight + layer.get_delta_weight(layer.active_adapters[0]).to(weight.dtype)

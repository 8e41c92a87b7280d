"""LoRA on a causal LM, by PEFT: W x becomes W x + alpha/rank * B A x, with B = 0 at the start.

The model stays the HF model that it was (transformers' own adapter mixin), its weights frozen, its adapters trained.
The reference is the same model with the adapters off, so no second copy exists and the first KL is 0 to the bit.
Adapters stay unmerged while sampling: merging and unmerging would round the frozen weights. No dropout, since the
update's logprobs must equal the rollout's. Left out on purpose: adapters on the embeddings or the head, whose weights
the fused losses read directly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ppomax.config import ModelConfig
from ppomax.models import blocks_of, save_model


def add_adapters(model: PreTrainedModel, config: ModelConfig, *, seed: int = 0) -> None:
    """Freeze `model` and give it trainable adapters as `config` says; `seed` fixes their start.

    ModuleNotFoundError if PEFT is missing, ValueError if a target names no linear layer of the blocks."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModuleNotFoundError(
            "model.train: lora needs PEFT, which is not installed; pip install 'ppomax[lora]'"
        ) from error
    layers = linear_layers(model)
    known = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for target in config.lora_targets or ():
        if not any(name == target or name.endswith("." + target) for name in layers):
            raise ValueError(
                f"model.lora_targets: {target!r} is no linear layer of {type(model).__name__}'s blocks (known: "
                f"{', '.join(known)}); name some of those, or leave it null for all"
            )
    wanted = config.lora_targets or known
    chosen = [n for n in layers if any(n == t or n.endswith("." + t) for t in wanted)]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules=chosen,
        fan_in_fan_out=isinstance(layers[chosen[0]], Conv1D),  # GPT-2's linear layers hold their weight transposed
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(lora)
    model.eval()


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


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with W + alpha/rank * B A in place of each adapted layer: a plain HF model again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    plain._hf_peft_config_loaded = False
    return plain.requires_grad_(True)


def export_adapters(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path) -> Path:
    """`path`: the merged HF model, tokenizer if given; `path`/adapter: the adapters alone, in PEFT's format."""
    whole = merged(model)
    if tokenizer is not None:
        save_model(whole, tokenizer, path)
    else:
        whole.save_pretrained(path, safe_serialization=True)
    model.save_pretrained(path / "adapter", safe_serialization=True)
    return path

"""Gradient checkpointing: a decoder block keeps what went into it, and the backward runs its forward once more.

    recompute_blocks(model)      an update then holds one block's activations and L block inputs, for a forward more
Wherever gradients are off (rollout, scoring, frozen models) a block runs as ever, cache and all. transformers' own
switch is not used: it asks for train mode, which evaluation of a policy must not be in, and drops the KV cache there,
also without gradients. Blocks must be deterministic (dropout is off in all of ours), so no random state is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ppomax.models.adapter_critic import AdapterCritic, AnyCritic
from ppomax.models.branch import TrunkCritic
from ppomax.models.critic import Critic
from ppomax.models.trunk import blocks_of


def recompute_blocks(model: PreTrainedModel | AnyCritic) -> None:
    """Have every decoder block of `model` recomputed in the backward, in place; gradients stay what they are."""
    if isinstance(model, AdapterCritic):
        recompute(blocks_of(model.base))
    elif isinstance(model, TrunkCritic):
        recompute(model.branch.blocks)
    else:
        recompute(blocks_of(model.model if isinstance(model, Critic) else model))


def recompute(blocks: Iterable[nn.Module]) -> None:
    """The same for the modules `blocks`; those that do it already are left as they are."""
    for block in blocks:
        if not isinstance(block.forward, Recomputed):
            block.forward = Recomputed(block.forward)


class Recomputed:
    """In the place of a module's `forward`, inside of its hooks: ZeRO-3 fetches the weights of the layers within anew
    as they run again. A class, since copying a model copies it too, with the method of the copied module."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

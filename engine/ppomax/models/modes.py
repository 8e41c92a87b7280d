"""What of the policy is trained, and what the reference then is (`model.train`).

    full    all weights              a whole frozen model
    lora    adapters                 the policy with its adapters off: no second copy
    hydra   the top blocks and norm  a frozen copy of those, run on the trunk's stored states
The policy stays a HF model whose `requires_grad` flags say what is trained. Tied or not, hydra freezes embeddings and
head, so that policy and reference share them: the reference is exact, and the loss makes no (V, D) gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ppomax.config import ModelConfig
from ppomax.models.adapters import adapters_off, add_adapters, has_adapters
from ppomax.models.branch import Branch, check_branch, train_top, with_top_of
from ppomax.models.frozen_bits import place
from ppomax.models.trunk import blocks_of, freeze
from ppomax.sharding import Trained
from ppomax.sharding.weights import LazyTensors, lazy_weights, overwrite

Reference = PreTrainedModel | Branch | None
"""A whole model, frozen top blocks on the policy's trunk, or (None) the policy with its adapters off."""


def trunk_layers(policy: PreTrainedModel, config: ModelConfig) -> int | None:
    """Blocks below the trained ones in hydra mode, else None. ValueError if none would be left in the trunk."""
    if config.train != "hydra":
        return None
    depth = len(blocks_of(policy))
    if config.trained_layers >= depth:
        raise ValueError(
            f"model.trained_layers is {config.trained_layers}, but the policy has {depth} blocks and hydra needs a "
            f"frozen one; set it to 1..{depth - 1}, or model.train: full"
        )
    return depth - config.trained_layers


def set_up(policy: PreTrainedModel, reference: PreTrainedModel | None, config: ModelConfig, *, seed: int) -> Reference:
    """Set `policy` up for `config.train`, in place, and return its reference; `reference` None: the policy as it is
    now."""
    if reference is not None and config.train != "full":
        raise ValueError(
            f"Engine: a reference was given, but with model.train: {config.train} the reference is the policy's own "
            "start; pass reference=None, or set model.train: full"
        )
    if config.train == "lora":
        add_adapters(policy, config, seed=seed)
        return None
    layers = trunk_layers(policy, config)
    if layers is None:
        policy.requires_grad_(True)
        given = copy.deepcopy(policy) if reference is None else reference
        return place(freeze(given), policy.device, config)  # type: ignore[return-value]
    check_branch(policy, layers)
    train_top(policy, layers)
    return freeze(Branch(policy, layers).copied())  # type: ignore[return-value]


@contextmanager
def start_policy(policy: Trained[PreTrainedModel], reference: Any) -> Iterator[PreTrainedModel]:
    """The reference as a whole model that can generate, whatever the mode and the sharding; no weights are copied.

    reference: the engine's: one of `Reference`, or the sharded form of a whole model."""
    if isinstance(reference, PreTrainedModel):
        yield reference
    elif reference is not None and not isinstance(reference, Branch):
        with reference.gathered() as whole:
            yield whole
    else:
        with policy.gathered() as module:
            if reference is not None:
                yield with_top_of(module, reference)
            elif has_adapters(module):
                with adapters_off(module):
                    yield module
            else:
                raise ValueError("start_policy: no reference, and the policy has no adapters to switch off")


def weights_as_reference(policy: Trained[PreTrainedModel], reference: Any) -> nn.Module:
    """What of the policy stands where the reference's weights are: modules of the same names."""
    return Branch(policy.module, reference.layers) if isinstance(reference, Branch) else policy.module


def refresh(policy: Trained[PreTrainedModel], reference: Any) -> None:
    """Make the policy as it is now the reference, whole or its top blocks, however either is sharded."""
    with policy.gathered():
        now = LazyTensors(lazy_weights(weights_as_reference(policy, reference)))
        overwrite(module_of(reference), now)


def module_of(reference: Any) -> nn.Module:
    """The reference's own weights."""
    return reference if isinstance(reference, nn.Module) else reference.module  # type: ignore[no-any-return]

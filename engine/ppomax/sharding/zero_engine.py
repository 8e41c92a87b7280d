"""A DeepSpeed engine around a module, and its weights made whole for a phase.

A loss reads the head's weight by hand, which no module's forward would fetch under ZeRO-3; so the whole loss runs
inside the forward of one wrapper, `LossModule`, and the head's parameters are registered as parameters that it
reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class LossModule(nn.Module):
    """Runs a function of `module` as its own forward, so that DeepSpeed's hooks surround all that it does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return function(self.module, *args, **named)


def library() -> Any:
    """DeepSpeed, without the extension that it would compile on CPUs: it serves inference alone, and is built under a
    lock file that a process killed meanwhile leaves behind, for which every later one would wait for ever."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(wrapper: LossModule, settings: dict[str, Any], optimizer: Any = None) -> Any:
    """DeepSpeed's engine of `wrapper`; without an optimiser the model is frozen."""
    deepspeed = library()
    if not torch.distributed.is_initialized():
        _alone()
    engine, *_ = deepspeed.initialize(model=wrapper, optimizer=optimizer, config=settings)
    return engine


def _alone() -> None:
    """A process group of one rank, for ZeRO without a launcher."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(hours=1))


def register_heads(wrapper: LossModule) -> None:
    """Tell ZeRO-3 which weights are read outside of their own module's forward: those of output heads, and what a
    module names as `read_by_hand`."""
    import deepspeed

    for module in wrapper.modules():
        for p in getattr(module, "read_by_hand", ()):
            deepspeed.zero.register_external_parameter(wrapper, p)
        head = getattr(module, "score", None)
        if head is None and isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()
        for p in head.parameters() if isinstance(head, nn.Module) else ():
            deepspeed.zero.register_external_parameter(wrapper, p)


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """All weights of a ZeRO-3 engine gathered, its hooks off: a forward inside costs no communication."""
    import deepspeed

    zero = engine.optimizer
    offload = getattr(zero, "parameter_offload", zero)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for p in engine.module.parameters():
            p.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)

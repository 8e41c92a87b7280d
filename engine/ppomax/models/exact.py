"""Whether a model's forwards can be exact: each token's states the same to the bit when it is decoded, scored or
trained on, whatever stands beside it. On a CPU in float32, where the trunk runs on our kernels, whose rows do not
depend on each other, and all that is left to torch is copies, sums and products of single numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ppomax.models import varlen
from ppomax.models.fused_trunk import fused_trunk
from ppomax.models.packed import packed_hidden
from ppomax.models.trunk import base_of

MOVES = """embedding index index_select gather view _unsafe_view reshape unsqueeze squeeze slice select split
split_with_sizes transpose permute t expand cat stack clone copy _to_copy empty new_empty empty_like zeros new_zeros
zero detach alias as_strided index_copy"""
SINGLE = frozenset(["add", "mul", "sub", "neg", *MOVES.split()])
"""torch's ops that make each number of the result from single numbers by one IEEE operation, or only move them."""


class _Watch(TorchDispatchMode):
    """Names of other ops that give floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0].removesuffix("_")
        parts = out if isinstance(out, (tuple, list)) else (out,)
        if name not in SINGLE and any(isinstance(x, Tensor) and x.is_floating_point() for x in parts):
            self.others.add(func.name())
        return out


@torch.no_grad()
def check_exact(model: PreTrainedModel) -> None:
    """ValueError, naming what is in the way, unless the model's forwards are exact. Asks the model itself: which ops it
    runs on two short sequences, and whether each alone gives the same bits."""
    what = type(model).__name__
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(f"rollout.exact: the weights of {what} are cut over the ranks; leave rollout.exact off")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"rollout.exact: {what} is in {model.dtype} on {model.device}; it needs float32 on a CPU, set model.dtype: "
            "float32 and run.device: cpu, or leave rollout.exact off"
        )
    if model.config._attn_implementation != varlen.NAME:
        raise ValueError(f"rollout.exact: {what} does not attend by our kernel; set model.attention: varlen or auto")
    tokens, ends = torch.arange(23) % model.config.get_text_config().vocab_size, (0, 18, 23)
    with fused_trunk(model):
        parts = [tokens[a:b] for a, b in pairwise(ends)]
        alone = [packed_hidden(model, part, torch.tensor([0, len(part)], dtype=torch.int32)) for part in parts]
        with _Watch() as watch:  # now, when what is looked up has been made
            together = packed_hidden(model, tokens, torch.tensor(ends, dtype=torch.int32))
    if watch.others:
        raise ValueError(
            f"rollout.exact: {what} runs {', '.join(sorted(watch.others))}, whose rows may depend on their neighbours "
            f"({type(base_of(model)).__name__} is not all linear layers, RMS norms, SwiGLU and rotary embeddings); "
            "leave rollout.exact off"
        )
    if not torch.equal(together, torch.cat(alone)):
        raise ValueError(
            f"rollout.exact: the states of {what} depend on what else is in a forward; leave rollout.exact off"
        )

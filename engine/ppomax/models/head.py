"""The output head of a causal LM, read off its config and held against the model's own logits.

logits = head_of(model).logits(hidden)                 (N, V); losses take hidden and weight instead"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from ppomax.models.packed import packed_hidden


@dataclass(frozen=True)
class Head:
    """Hidden (N, D) into logits (N, V): softcap * tanh(z / softcap) with z = scale * (hidden @ weight.T + bias)."""

    weight: Tensor
    """(V, D), the model's own parameter (tied or not), so that gradients reach it."""
    bias: Tensor | None = None
    """(V,) or None."""
    softcap: float | None = None
    """Gemma's final_logit_softcapping; None where the model has none."""
    scale: float = 1.0
    """Cohere's logit_scale, 1 / Granite's logits_scaling; 1 for most. A kernel takes it as temperature = 1 / scale."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V); the readable form, for tests and sampling. Losses go straight from hidden."""
        return self.capped(nn.functional.linear(hidden, self.weight, self.bias))

    def scaled(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states and bias with the scale put into them, as the linear kernels take them."""
        if self.scale == 1.0:
            return hidden, self.bias
        return hidden * self.scale, None if self.bias is None else self.bias * self.scale

    def capped(self, z: Tensor) -> Tensor:
        """Scale and softcap over a product `hidden @ weight.T + bias` that was made elsewhere."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal LM, as its config describes it; `check_head` holds it against the model's logits."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"head_of: {type(model).__name__} has no output embeddings; load it as a causal language model"
        )
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), float(softcap) if softcap else None, scale)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError if head_of(model) on the hidden states of three tokens does not give the model's own logits."""
    tokens = torch.arange(3, device=model.device) % head_of(model).weight.shape[0]
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=model.device)
    training = model.training
    model.eval()
    got = head_of(model).logits(packed_hidden(model, tokens, cu_seqlens)).float()
    want = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    model.train(training)
    tolerance = (1e-4 if model.dtype == torch.float32 else 5e-2) * max(1.0, want.abs().max().item())
    if got.shape != want.shape or not (got - want).abs().max().item() <= tolerance:
        raise ValueError(
            f"{type(model).__name__}: hidden @ head weight does not give the model's logits; its head does "
            "something that head_of does not know. Use an architecture whose head is linear (with softcap or scale), "
            "or extend head_of."
        )

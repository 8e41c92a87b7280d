"""transformers: a causal LM's loss without its logits, in a plain Trainer by one line.

    from ppomax.integrations.transformers import fuse_loss
    trainer = Trainer(model=fuse_loss(model), ...)
In training a forward with labels then runs the model up to its last hidden states and gives the loss straight from
them: the logits and their gradients, (tokens, vocabulary) in float32, are what a step of a small batch mostly holds.
Evaluation, forwards without labels, and generate are the model's own. For all families whose head is linear (a softcap
or scale is known); the head is held against the model's logits before anything is replaced. Data parallel or ZeRO up to
stage 2; not a head that ZeRO-3 or FSDP has cut, which the kernel refuses by name."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ppomax.integrations import IntegrationError
from ppomax.models import head_of
from ppomax.models.head import check_head

LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""What a Trainer says of the loss beside the labels."""
OWN = ("logits_to_keep", "output_router_logits")
"""Set, they ask for what needs the model's own forward."""


def fuse_loss(model: PreTrainedModel, *, impl: str = "auto") -> PreTrainedModel:
    """Have `model(..., labels=labels).loss` in training be `ForCausalLMLoss(logits, labels)` by linear_nll, its logits
    None; in place, returns the model. impl: back-end of the kernel. IntegrationError: the model's loss is another one;
    ValueError: its head is not linear."""
    if model.loss_function is not ForCausalLMLoss:
        raise IntegrationError(
            f"{type(model).__name__} has the loss {getattr(model.loss_function, '__name__', model.loss_function)}, "
            "where ForCausalLMLoss is known; use a *ForCausalLM of transformers as it comes"
        )
    check_head(model)
    own = model.forward
    signature = inspect.signature(own)

    @functools.wraps(own)
    def forward(*args: Any, **named: Any) -> Any:
        given = dict(signature.bind_partial(*args, **named).arguments)
        given |= given.pop("kwargs", {})
        labels = given.pop("labels", None)
        if labels is None or not model.training or any(_asked(given.get(name)) for name in OWN):
            return own(*args, **named)
        of_loss = {name: given.pop(name) for name in LOSS if name in given}
        as_tuple = given.pop("return_dict", None) is False
        out = model.base_model(**{name: x for name, x in given.items() if name not in OWN})
        loss = causal_lm_loss(model, out.last_hidden_state, labels, impl=impl, **of_loss)
        found = CausalLMOutputWithPast(
            loss=loss,
            past_key_values=out.get("past_key_values"),
            hidden_states=out.get("hidden_states"),
            attentions=out.get("attentions"),
        )
        return found.to_tuple() if as_tuple else found

    model.forward = forward  # type: ignore[method-assign]
    return model


def causal_lm_loss(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """`ForCausalLMLoss(head(hidden), labels, ...)`: the 0-d mean NLL of each next label, or their sum over
    num_items_in_batch. hidden (B, T, D); labels (B, T), or shift_labels that are moved already; both may hold
    ignore_index."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    head = head_of(model)
    flat, bias = head.scaled(hidden.flatten(0, -2))
    count = num_items_in_batch.float() if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    loss, _ = K.linear_nll(
        flat,
        head.weight,
        shift_labels.flatten().to(hidden.device),
        bias=bias,
        softcap=head.softcap,
        normalizer=count.to(hidden.device) if isinstance(count, Tensor) else count,
        ignore_index=ignore_index,
        impl=impl,
    )
    return loss


def _asked(x: Any) -> bool:
    return x is not None and (isinstance(x, Tensor) or bool(x))

"""TRL's GRPO and RLOO trainers on our fused logprob and entropy: no logits are held, (B, T, V) being most of what they
hold.

    from ppomax.integrations.trl import patch_logprobs; patch_logprobs()     then GRPOTrainer(...).train() as before
Left to TRL's own code: inputs with images, the load-balancing loss of mixtures of experts, and heads that are not
linear (one with an adapter on it). Known: TRL 1.10."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppomax.integrations import check_signature
from ppomax.integrations.trl.batch import plain
from ppomax.models import head_of
from ppomax.recipe.scoring import head_logprobs

TEXT = ("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss")  # fmt: skip
IMAGES = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
          "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")  # fmt: skip
METHOD = "_get_per_token_logps_and_entropies"


def patch_logprobs() -> None:
    """Put ours in the place of both trainers' method. IntegrationError: it takes other parameters than are known."""
    from importlib.metadata import version

    from trl import GRPOTrainer, RLOOTrainer

    for trainer in (GRPOTrainer, RLOOTrainer):
        theirs = getattr(trainer, METHOD)
        if hasattr(theirs, "theirs"):
            continue
        check_signature(theirs, (*TEXT, *IMAGES), f"trl {version('trl')}")

        def ours(
            self: Any,
            model: Any,
            input_ids: Tensor,
            attention_mask: Tensor,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            compute_aux_loss: bool = False,
            theirs: Any = theirs,
            **others: Any,
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            causal_lm = plain(self.accelerator.unwrap_model(model))
            linear = type(causal_lm.get_output_embeddings()) is nn.Linear
            if compute_aux_loss or not linear or any(x is not None for x in others.values()):
                given = (
                    model,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    batch_size,
                    compute_entropy,
                    compute_aux_loss,
                )
                return theirs(self, *given, **others)  # type: ignore[no-any-return]
            trained = bool(getattr(self, "_entropy_bonus_enabled", False))
            found = []
            for ids, mask in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
                score = partial(_scored, causal_lm, ids, mask, logits_to_keep, self.temperature, compute_entropy)
                found.append(_inside_forward(model, causal_lm, score))
            logprobs = torch.cat([x for x, _ in found])
            if not compute_entropy:
                return logprobs, None, None
            entropy = torch.cat([x for _, x in found if x is not None])
            return logprobs, entropy if trained else entropy.detach(), None

        ours.theirs = theirs  # type: ignore[attr-defined]
        setattr(trainer, METHOD, ours)


def _scored(
    model: Any, ids: Tensor, mask: Tensor, kept: int, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """(B, kept) log-probabilities of the last `kept` ids, and entropies."""
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden = hidden[:, -kept - 1 : -1].flatten(0, 1)
    labels = ids[:, -kept:]
    found = head_logprobs(hidden, head_of(model), labels.flatten(), temperature=temperature, entropy=entropy)
    logprobs, entropies = (None if x is None else x.view_as(labels) for x in found)
    assert logprobs is not None
    return logprobs, entropies


def _inside_forward(model: Any, inner: Any, score: Any) -> Any:
    """`score()` as what `inner.forward` does in a forward of `model`, so that DDP's and FSDP's hooks see one."""
    if model is inner:
        return score()
    own = inner.__dict__.get("forward")

    def forward(*_: Any, **__: Any) -> Any:
        if own is None:
            del inner.forward
        else:
            inner.forward = own
        return score()

    inner.forward = forward
    return model()

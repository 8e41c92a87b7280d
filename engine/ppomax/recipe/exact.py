"""Whether a run's rollout gives what scoring would, to the bit, so that the policy is not scored (`rollout.exact`)."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from ppomax.config import TrainConfig
from ppomax.models.exact import check_exact
from ppomax.models.fused_trunk import fused_trunk
from ppomax.recipe.batch import pack
from ppomax.recipe.scoring import score_states
from ppomax.rollout import Sampling, decode

log = logging.getLogger("ppomax")
PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [3, 1])
NEW = 4
"""Tokens of each response of the trial."""


def exact_rollout(policy: PreTrainedModel, config: TrainConfig) -> bool:
    """Whether this policy's rollouts record what scoring gives. ValueError, naming what is in the way, if the
    configuration asks for it and it cannot be; where it leaves it open, the log tells."""
    wanted, reason = config.rollout.exact, config.why_not_exact
    if wanted is False or reason:
        return False
    try:
        check_exact(policy)
        check_decoding(policy, config.impl)
    except ValueError as error:
        if wanted:
            raise
        log.info("the policy is scored after the rollout: %s", error)
        return False
    log.info("decoding records what scoring would give, to the bit: the policy is not scored again")
    return True


@torch.no_grad()
def check_decoding(policy: PreTrainedModel, impl: str) -> None:
    """ValueError unless two short responses' recorded logprobs and entropies are those of scoring, to the bit."""
    vocabulary = policy.config.get_text_config().vocab_size
    prompts = [[i % vocabulary for i in prompt] for prompt in PROMPTS]
    drawn = decode(policy, prompts, range(len(prompts)), Sampling(NEW, exact=True, impl=impl), eos_ids=())
    tokens, ends = pack([p + r for p, r in zip(prompts, drawn.tokens, strict=True)])
    states = torch.cat([torch.arange(b - NEW, b) - 1 for b in ends[1:].tolist()])
    with fused_trunk(policy, impl=impl):
        scored = score_states(policy, tokens, ends, states, entropy=True, impl=impl)
    assert drawn.scored is not None
    assert scored.entropy is not None
    recorded = torch.cat(drawn.scored)
    if not torch.equal(recorded, torch.stack([scored.logprobs, scored.entropy], 1)):
        gap = float((recorded[:, 0] - scored.logprobs).abs().max())
        raise ValueError(
            f"rollout.exact: what decoding {type(policy).__name__} records differs from scoring, by {gap:.1e} in a "
            "logprob; leave rollout.exact off"
        )

"""Who draws the responses: our own decoder on the policy itself, or another engine that is handed the policy's weights.

Whatever draws, responses are scored by the engine's own models, so ratio and KL stay those of the training forward;
`rollout/logprob_gap` tells how far the sampler is from it, and `loss.sampler_is_cap` weighs tokens by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from ppomax.rollout.responses import Responses
from ppomax.rollout.sampling import Sampling
from ppomax.rollout.sizes import RolloutError
from ppomax.sharding import Lazy

ABOVE_ZERO = 1e-3
"""How far a logprob may be above 0 by rounding."""


class Sampler(Protocol):
    """An engine of its own that draws responses. Under several ranks each has one, for its share of the prompts."""

    def take(self, weights: Mapping[str, Lazy]) -> None:
        """Take the policy's weights as they are now, under transformers' names. Those that are cut over the ranks are
        made whole one by one, so every rank must ask for all of them, in the order given."""

    def sample(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: Sampling, *, eos_ids: Sequence[int]
    ) -> Responses:
        """One response to each prompt, as `decode` gives them; `uids` name the random streams. logprobs are those of
        the distribution that each token was drawn from."""

    def close(self) -> None:
        """Let go of memory and processes."""


def checked(
    given: Responses, prompts: Sequence[Sequence[int]], sampling: Sampling, *, eos_ids: Sequence[int], vocabulary: int
) -> Responses:
    """`given`, if it is what `Sampler.sample` promises. RolloutError names the first response that is not, and how."""
    if not len(given.tokens) == len(given.logprobs) == len(given.finished) == len(prompts):
        raise RolloutError(
            f"rollout: the sampler was given {len(prompts)} prompts and returned {len(given.tokens)} responses, "
            f"{len(given.logprobs)} rows of logprobs and {len(given.finished)} ends; it must return one of each"
        )
    ends, most = frozenset(eos_ids), sampling.max_new_tokens
    for i, (tokens, logprobs, finished) in enumerate(zip(given.tokens, given.logprobs, given.finished, strict=True)):
        odd = [t for t in tokens if not 0 <= t < vocabulary]
        bad = [x for x in logprobs if not (math.isfinite(x) and x <= ABOVE_ZERO)]
        early = [t for t in tokens[:-1] if t in ends]
        for wrong, what in (
            (
                not 1 <= len(tokens) <= sampling.max_new_tokens,
                f"{len(tokens)} tokens, not 1..{sampling.max_new_tokens}",
            ),
            (odd, f"token {odd[:1]}, not in the policy's vocabulary of {vocabulary}"),
            (len(logprobs) != len(tokens), f"{len(logprobs)} logprobs for {len(tokens)} tokens"),
            (bad, f"a logprob of {bad[:1]}, which no distribution has"),
            (early, f"the end token {early[:1]} before its last token"),
            (tokens and finished != (tokens[-1] in ends), f"finished={finished} with the last token {tokens[-1:]}"),
            (
                tokens and not finished and len(tokens) < most,
                f"{len(tokens)} tokens without an end, below the limit of {most}",
            ),
        ):
            if wrong:
                raise RolloutError(f"rollout: the sampler returned for prompt {i} {what}")
    return given

"""The responses of all ranks on every rank."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.rollout.responses import Responses
from ppomax.sharding import ranks


def joined(responses: Responses, policy: PreTrainedModel) -> Responses:
    """The responses of all ranks, in rank order, on every rank; their numbers travel as tensors. Trunk states stay
    where they are: `trunk` is that of this rank's own responses. One process: the same."""
    if ranks.world_size() == 1:
        return responses
    device = policy.device
    lengths = ranks.gather(torch.tensor([len(r) for r in responses.tokens], dtype=torch.int64, device=device)).tolist()
    tokens = torch.tensor([t for r in responses.tokens for t in r], dtype=torch.int64, device=device)
    logprobs = torch.tensor([x for r in responses.logprobs for x in r], dtype=torch.float32, device=device)
    finished = torch.tensor(responses.finished, dtype=torch.uint8, device=device)
    return Responses(
        [part.tolist() for part in ranks.gather(tokens).split(lengths)],
        [part.tolist() for part in ranks.gather(logprobs).split(lengths)],
        [bool(x) for x in ranks.gather(finished).tolist()],
        responses.trunk,
        _rows(responses.kept, lengths),
        _rows(responses.scored, lengths),
    )


def _rows(parts: list[Tensor] | None, lengths: list[int]) -> list[Tensor] | None:
    """A row of numbers a token, of all ranks."""
    return None if parts is None else list(ranks.gather(torch.cat(parts)).split(lengths))

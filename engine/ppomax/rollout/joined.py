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
        _rows(responses.kept, lengths, device),
        _rows(responses.scored, lengths, device),
    )


def _rows(parts: list[Tensor] | None, lengths: list[int], device: torch.device) -> list[Tensor] | None:
    """A row of numbers a token, of all ranks, some of which may have no responses."""
    if parts is None:
        return None
    kinds = ranks.gather_objects((parts[0].shape[1], parts[0].dtype) if parts else None)
    width, dtype = next(kind for kind in kinds if kind is not None)
    own = torch.cat(parts) if parts else torch.empty(0, width, dtype=dtype, device=device)
    return list(ranks.gather(own).split(lengths))

"""A vocabulary split by rows of the weight over a process group (tensor parallelism of the head), shards of any size.
From each rank's logsumexp L_r, entropy H_r and logprob of the label in its own shard: L = logsumexp_r L_r ;
share s_r = e^(L_r - L) ; logprob = logprob_r + log s_r ; H = sum_r s_r * (H_r - log s_r): forms in which the size of
the logits costs few digits (those that L_r, one float32, has lost). One all-gather of 12 B a token and rank; the
backward needs nothing but the global L and H."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NOT_HERE = 1.0  # in place of a logprob, which is never above 0
FOREIGN = -(2**63)  # a label that lies in another rank's shard: no one-hot here, but the row counts


@dataclass(frozen=True)
class VocabShard:
    """Where this rank's rows of the weight stand in the whole vocabulary. Make it once with `VocabShard.of(weight,
    group)`."""

    group: "ProcessGroup"
    start: int
    size: int
    total: int

    @staticmethod
    def of(weight: Tensor, group: "ProcessGroup") -> "VocabShard":
        """Asks every rank of the group for its number of rows (a collective: all ranks call it); shards follow each
        other in rank order."""
        import torch.distributed as dist

        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("VocabShard.of: this process is not in the group; call it on the ranks that hold a shard")
        shape = torch.tensor(list(weight.shape), dtype=torch.int64, device=weight.device)
        shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shapes, shape, group=group)
        rows = [int(s[0]) for s in shapes]
        widths = sorted({int(s[1]) for s in shapes})
        if len(widths) > 1:
            raise ValueError(
                f"VocabShard.of: weight must have the same hidden size on every rank, got {widths}; shard by rows of "
                "V only"
            )
        if min(rows) < 1:
            raise ValueError(
                f"VocabShard.of: every rank needs at least one row of the weight, got {rows}; use a smaller group"
            )
        return VocabShard(group, sum(rows[:rank]), rows[rank], sum(rows))

    def check(self, op: str, weight: Tensor) -> None:
        if weight.shape[0] != self.size:
            raise ValueError(
                f"{op}: weight must have the {self.size} rows of this rank's shard ({self.start} to "
                f"{self.start + self.size} of {self.total}), "
                f"got {weight.shape[0]}; make the shard with VocabShard.of(weight, group)"
            )

    def local_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels counted from this shard's first row; those of other shards become FOREIGN, ignored ones stay,
        impossible ones stay impossible."""
        local = labels - self.start
        here = (local >= 0) & (local < self.size)
        elsewhere = torch.where((labels >= 0) & (labels < self.total), FOREIGN, self.size)
        return torch.where(labels == ignore_index, ignore_index, torch.where(here, local, elsewhere))

    def combine(self, labels: Tensor, logprobs: Tensor, entropy: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's row results (with local labels) -> logprobs, entropy and lse over the whole vocabulary."""
        import torch.distributed as dist

        mine = torch.stack([lse, entropy, torch.where(labels == FOREIGN, NOT_HERE, logprobs)])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        return _combine(torch.stack(parts))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place."""
        import torch.distributed as dist

        dist.all_reduce(x, group=self.group)
        return x


def combine(parts: list[tuple[Tensor, Tensor, Tensor]], labels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Row results (logprobs, entropy, lse) of parts of the vocabulary, each with its own labels, -> of all of it."""
    return _combine(
        torch.stack(
            [
                torch.stack([lse, entropy, torch.where(y == FOREIGN, NOT_HERE, logprobs)])
                for (logprobs, entropy, lse), y in zip(parts, labels, strict=True)
            ]
        )
    )


def _combine(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R, 3, N) of lse, entropy, logprob or NOT_HERE -> logprobs, entropy, lse (N,) float32."""
    part_lse, part_entropy, picked = parts.double().unbind(1)
    whole = torch.logsumexp(part_lse, 0)
    log_share = part_lse - whole
    share = torch.exp(log_share)
    total_entropy = torch.where(share > 0, share * (part_entropy - log_share), 0.0).sum(0)
    found = torch.where(picked == NOT_HERE, 0.0, picked + log_share).sum(0)
    return found.float(), total_entropy.float(), whole.float()

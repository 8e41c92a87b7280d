"""Run by torchrun on 2 gloo ranks: whiten over the group against the truth on the tokens of all ranks. Prints `ok
<what>` on rank 0 for each check; any difference raises."""

import gc
import sys

import ppomax_kernels as K
import torch
import torch.distributed as dist

from tests.kernels import oracle, plain
from tests.kernels.contract import f64, hold, same_bits

# Tokens of rank 0 and 1. A rank may hold none, or nothing but masked ones.
SHARES = {"even": (400, 400), "uneven": (1000, 3), "one rank without tokens": (300, 0), "no tokens at all": (0, 0)}


def of_rank(share: tuple[int, int], rank: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(10 + rank)
    x = 3.0 + 5.0 * rank + torch.randn(share[rank], generator=g)
    if not masked:
        return x, None
    mask = torch.rand(share[rank], generator=g) < 0.7
    return x.masked_fill(~mask, torch.nan), mask


def main() -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    said = []
    for name, share in SHARES.items():
        for masked in (False, True):
            parts = [of_rank(share, r, masked) for r in (0, 1)]
            every = torch.cat([x if m is None else x[m] for x, m in parts])
            x, mask = parts[rank]
            for impl in ("ref", "cpu"):
                for shift in (True, False):
                    got = K.whiten(x, mask, shift_mean=shift, group=group, impl=impl)
                    keep = None if mask is None else mask.numpy()
                    truth = oracle.whiten_truth(f64(x), keep, shift, 1e-8, of=f64(every))
                    hold(f"{name} {impl} rank {rank}", got, truth, plain.whiten(x, mask, shift, 1e-8, of=every))
            said.append(f"ok {name}{', masked' if masked else ''}")
    x = of_rank((50, 50), rank, False)[0]
    alone = dist.new_group([0]), dist.new_group([1])
    same_bits("a group of one rank", K.whiten(x, group=alone[rank]), K.whiten(x))
    said.append("ok a group of one rank")
    first, second = (K.whiten(of_rank((501, 20), rank, True)[0].nan_to_num(), group=group) for _ in range(2))
    same_bits("twice", first, second)
    said.append("ok twice")
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # cycles held the group, whose threads abort a process whose interpreter has ended
    if rank == 0:
        sys.stdout.write("\n".join(said) + "\n")


if __name__ == "__main__":
    main()

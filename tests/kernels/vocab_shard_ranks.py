"""Run by torchrun on 2 gloo ranks: the vocabulary-parallel ops on all cases of the linear ops, each rank with its rows
of weight and bias, held against the same oracle. Rank 0 prints `ok <what>` after each part; a difference raises."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import ppomax_kernels as K
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels import linear


class OwnRows(torch.autograd.Function):
    """This rank's rows; backward puts the ranks' gradients together, so that each sees that of the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, stop: int) -> Tensor:
        ctx.place = x.shape, start, stop
        return x[start:stop].clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        shape, start, stop = ctx.place
        whole = d.new_zeros(shape)
        whole[start:stop] = d
        dist.all_reduce(whole)
        return whole, None, None


def sharded(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` as the checks call it, on shards of a third and two thirds."""

    @functools.wraps(op)
    def run(hidden: Tensor, weight: Tensor, *rest: Any, bias: Tensor | None = None, **options: Any) -> Any:
        cut = max(1, len(weight) // 3)
        start, stop = (0, cut) if dist.get_rank() == 0 else (cut, len(weight))
        mine = OwnRows.apply(weight, start, stop)
        own_bias = None if bias is None else OwnRows.apply(bias, start, stop)
        shard = K.VocabShard.of(mine, dist.group.WORLD)
        assert (shard.start, shard.size, shard.total) == (start, stop - start, len(weight))
        return op(hidden, mine, *rest, bias=own_bias, shard=shard, **options)

    return run


def refused(what: str, call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert all(w in str(error.value) for w in words), f"{what}: {error.value}"


def bad_input() -> None:
    hidden, weight, labels = torch.randn(5, 8), torch.randn(12, 8), torch.arange(5)
    rank, group = dist.get_rank(), dist.group.WORLD
    refused("hidden sizes", lambda: K.VocabShard.of(weight[:, : 8 - rank], group), "hidden size", "[7, 8]")
    refused("an empty shard", lambda: K.VocabShard.of(weight[: 12 * rank], group), "at least one row", "[0, 12]")
    shard = K.VocabShard.of(weight[:4], group)
    for op in (K.linear_token_logprobs, K.linear_nll):
        refused(op.__name__, lambda op=op: op(hidden, weight, labels, shard=shard), op.__name__, "4 rows", "got 12")
    refused("a label", lambda: K.linear_nll(hidden, weight[:4], labels + 4, shard=shard), "linear_nll", "[0, 8)")
    refused("ref", lambda: K.linear_nll(hidden, weight[:4], labels, shard=shard, impl="ref"), "impl='ref'")


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    say = print if dist.get_rank() == 0 else lambda *_: None
    for name, cases in (
        ("linear_token_logprobs", linear.LINEAR_LOGPROBS),
        ("linear_nll", linear.LINEAR_NLL),
        ("linear_ppo_loss", linear.LINEAR_PPO),
    ):
        whole = [case for case in cases if case.vocab > 1]
        for case in whole:
            getattr(linear, name)(sharded(getattr(K, name)), case)
        say(f"ok {name}: {len(whole)} cases")
    bad_input()
    say("ok bad input")
    dist.destroy_process_group()
    gc.collect()  # cycles held the group, whose threads abort a process whose interpreter has ended


if __name__ == "__main__":
    main()

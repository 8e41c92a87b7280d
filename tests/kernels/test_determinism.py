"""Same input, same bits: run to run, with 1 or 2 threads, and on memory that held something else before."""

import pytest
import torch
from ppomax_kernels.registry import OPS, table_of

from .backends import Backend
from .calls import Call
from .cases import Logits, Packed, Spread, Tokens
from .contract import same_bits


@pytest.fixture
def call(impl: Backend, op: str) -> Call:
    if impl.name not in table_of(op):
        pytest.skip(f"{impl.name}: {op} has no such back-end")
    return Call(op, impl, 12 if impl.interpreted else 200 if op.startswith("linear") else 3000)


def dirty_the_allocator(device: str) -> None:
    """Free memory that the next results are likely to be given is full of NaN."""
    junk = [
        torch.full((size,), torch.nan, device=device)
        for size in (1, 2, 9, 12, 64, 192, 804, 1072, 3000, 48000, 201000)
        for _ in range(4)
    ]
    del junk


@pytest.mark.parametrize("op", OPS)
def test_run_to_run(call: Call, op: str) -> None:
    first = call.both()
    dirty_the_allocator(call.impl.device)
    for i, (a, b) in enumerate(zip(first, call.both(), strict=True)):
        same_bits(f"{op}: result {i}", a, b)


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("linear")])
def test_threads(call: Call, op: str) -> None:
    """The linear ops' GEMMs are torch's, whose sums may be split by threads; everything of ours is not."""
    if call.impl.name != "cpu":
        pytest.skip(f"{call.impl.name}: not its threads")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(call.both())
    finally:
        torch.set_num_threads(before)
    for threads, other in zip((2, 3, 8), results[1:], strict=True):
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            same_bits(f"{op}: result {i} with {threads} threads", a, b)


def test_threads_on_ragged_sizes(impl: Backend) -> None:
    """Few rows and many threads, sums over sizes that no block divides, one long sequence."""
    import ppomax_kernels as K

    if impl.name != "cpu":
        pytest.skip(f"{impl.name}: not its threads")
    logits, labels, _, _ = Logits((3,), 50257).draw()
    x = Packed((70001, 5, 1), gamma=0.99).draw()
    wide, mask = Spread((65537,), "some", seed=1).draw()
    t = Tokens((65537,), "far", "some", seed=1).draw()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss, metrics = K.ppo_loss(t["first"], t["old"], t["advantages"], t["mask"])
            results.append(
                [
                    *K.token_logprobs(logits, labels, return_entropy=True),
                    *K.gae(x["rewards"], x["values"], x["cu_seqlens"], gamma=0.99),
                    K.whiten(wide, mask),
                    loss,
                    metrics.tensor,
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            same_bits(f"result {i}", a, b)


def test_order_of_rows(impl: Backend) -> None:
    """Rows may be permuted: each keeps its bits, also where they are shared out to other threads."""
    import ppomax_kernels as K

    n = 6 if impl.interpreted else 50
    logits, labels, _, _ = Logits((n,), 1300, seed=4).draw(impl.device)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(impl.device)
    straight = K.token_logprobs(logits, labels, return_entropy=True, impl=impl.name)
    turned = K.token_logprobs(logits[order], labels[order], return_entropy=True, impl=impl.name)
    for a, b in zip(straight, turned, strict=True):
        same_bits("permuted rows", a[order], b)

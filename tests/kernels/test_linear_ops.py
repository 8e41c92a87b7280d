"""linear_token_logprobs, linear_ppo_loss and linear_nll against float64, and the pitfalls that are theirs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels import chunks
from ppomax_kernels.chunks import default_chunk
from ppomax_kernels.internal.packed_linear import packed_bytes, product
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import linear
from .backends import Backend
from .cases import IGNORE
from .contract import all_zero, f64, hold, same_bits
from .linear import LINEAR_LOGPROBS, LINEAR_NLL, LINEAR_PPO, Linear
from .verify import leaf

OPS = ("linear_token_logprobs", "linear_ppo_loss", "linear_nll")


@pytest.mark.parametrize("case", LINEAR_LOGPROBS, ids=str)
def test_logprobs_oracle(impl: Backend, case: Linear) -> None:
    linear.linear_token_logprobs(impl.bind(K.linear_token_logprobs), case, impl.device)


@pytest.mark.parametrize("case", LINEAR_PPO, ids=str)
def test_ppo_oracle(impl: Backend, case: Linear) -> None:
    linear.linear_ppo_loss(impl.bind(K.linear_ppo_loss), case, impl.device)


@pytest.mark.parametrize("case", LINEAR_NLL, ids=str)
def test_nll_oracle(impl: Backend, case: Linear) -> None:
    linear.linear_nll(impl.bind(K.linear_nll), case, impl.device)


def outputs(op: str, impl: Backend, x: dict[str, Tensor], rows: slice = slice(None), **options: object) -> list[Tensor]:
    """Results of each row first, gradient of hidden last."""
    hidden = leaf(x["hidden"][rows])
    head = (hidden, x["weight"], x["labels"][rows])
    if op == "linear_token_logprobs":
        out = list(K.linear_token_logprobs(*head, return_entropy=True, impl=impl.name, **options))
        up = [x["dlogprobs"][rows], x["dentropy"][rows]]
    else:
        rest = (x["old"][rows], x["advantages"][rows]) if op == "linear_ppo_loss" else ()
        more = dict(ent_coef=0.1) if op == "linear_ppo_loss" else {}
        out = [getattr(K, op)(*head, *rest, normalizer=7.0, impl=impl.name, **more, **options)[0]]
        up = [torch.ones_like(out[0])]
    results = out if op == "linear_token_logprobs" else []
    return [*results, torch.autograd.grad(out, hidden, up)[0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_alone_or_among_many(impl: Backend, op: str, dtype: str) -> None:
    """With batch_invariant=True a row's results are the same to the bit, whatever rows come with it and wherever
    chunks are cut."""
    if impl.name == "ref":
        pytest.skip("ref: one GEMM of whatever shape comes; invariance is not its business")
    x = Linear(rows=21, dtype=dtype, ignored=0.3, seed=3).draw(impl.device)
    options = dict(batch_invariant=True, chunk_tokens=4)
    every = outputs(op, impl, x, **options)
    for rows in (slice(0, 1), slice(6, 7), slice(3, 15), slice(20, 21)):
        for what, part, whole in zip(("a", "b", "c"), outputs(op, impl, x, rows, **options), every, strict=False):
            same_bits(f"{op} {what} of rows {rows}", part, whole[rows])


@pytest.mark.parametrize("op", OPS)
def test_chunk_sizes_agree(impl: Backend, op: str) -> None:
    """Cutting into chunks of 1, 5 or all rows is no more than a rounding; each is held to the oracle."""
    case = Linear(rows=11, ignored=0.2, ent_coef=0.2 if op == "linear_ppo_loss" else 0.0, seed=2)
    for chunk in (1, 5, 11, 4000):
        getattr(linear, op)(impl.bind(getattr(K, op)), replace(case, chunk=chunk), impl.device)


@pytest.mark.parametrize("case", [c for c in LINEAR_LOGPROBS if c.dtype == "float32" and not c.invariant], ids=str)
def test_tiles_oracle(monkeypatch: pytest.MonkeyPatch, case: Linear) -> None:
    """The vocabulary in tiles and the tokens in blocks, as a CPU cuts large problems: held to the same oracle."""
    small_tiles(monkeypatch)
    linear.linear_token_logprobs(Backend("cpu", "cpu").bind(K.linear_token_logprobs), replace(case, chunk=None), "cpu")


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "TILE_TOKENS", 5)
    monkeypatch.setattr(chunks, "TILE_ELEMENTS", 5 * 44)
    monkeypatch.setattr(chunks, "WIDEST_WHOLE", 1)


def test_no_label_of_a_tile_is_taken_for_the_ignored_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """ignore_index 3 is an entry of the vocabulary, and the place of other entries in their tiles."""
    whole = Linear(rows=40, seed=5).draw()
    small_tiles(monkeypatch)
    cut = chunks.tiles(131, chunks.blocks(0, 40, whole["weight"], False)[1])
    starts = [t.start for t in cut if t.start + 3 < t.stop]
    labels = torch.tensor([starts[i % len(starts)] + 3 for i in range(40)])
    assert len(starts) > 1
    kept = labels != 3
    got = K.linear_token_logprobs(whole["hidden"].nan_to_num(), whole["weight"], labels, ignore_index=3, impl="cpu")
    want = torch.log_softmax(whole["hidden"].nan_to_num().double() @ whole["weight"].double().T, 1)
    want = want.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(got[kept].double(), want[kept], atol=1e-5, rtol=1e-5)
    assert not got[~kept].any()


@pytest.mark.parametrize("n", [1, 64, 1024, 5000])
def test_blocks_cover_a_cpu_chunk_and_no_more(n: int) -> None:
    for vocab in (10, 32000, 151936):
        tokens, tile = chunks.blocks(0, n, torch.empty(vocab, 1), False)
        assert tokens <= n
        most = max(chunks.CPU_TOKENS * chunks.WIDEST_WHOLE, 1.5 * chunks.TILE_ELEMENTS + 64 * tokens)
        assert tokens * tile <= most
        assert [(t.start, t.stop) for t in chunks.tiles(vocab, tile)][-1][1] == vocab


def test_default_chunk_is_a_pure_function_of_shapes() -> None:
    for device in ("cpu", "cuda"):
        sizes = [default_chunk(v, device) for v in (1, 1000, 32000, 151936, 10**6)]
        assert sizes == [default_chunk(v, device) for v in (1, 1000, 32000, 151936, 10**6)]
        assert sizes == sorted(sizes, reverse=True)
        assert all(n >= 64 for n in sizes)


@dataclass(frozen=True)
class Work:
    """Multiplications in matrix products, torch's that the profiler saw and our own; and the largest piece of memory
    asked for, in bytes."""

    products: int
    largest: int


def work_of(run: Callable[[], Any]) -> tuple[Any, Work]:
    products = 0

    def counted(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        nonlocal products
        products += len(x) * weight.numel()
        return product(x, weight, *rest, **named)

    with (
        patch.object(chunks, "product", counted),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen,
    ):
        result = run()
    for event in seen.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (n, k), (_, m) = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            products += n * k * m
    pieces = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, Work(products, max(pieces, default=0))


def walk(op: str, impl: Backend, x: dict[str, Tensor], wants: tuple[str, ...], **options: object) -> tuple[Work, Work]:
    """Work of the forward and of the backward."""
    y = {**x, **{n: leaf(x[n]) for n in wants}}
    rest = (x["old"], x["advantages"]) if op == "linear_ppo_loss" else ()
    out, forward = work_of(
        lambda: getattr(K, op)(y["hidden"], y["weight"], x["labels"], *rest, impl=impl.name, **options)
    )
    loss = out[0] if isinstance(out, tuple) else out.sum()
    if not wants:
        return forward, Work(0, 0)
    _, backward = work_of(lambda: torch.autograd.grad(loss, [y[n] for n in wants]))
    return forward, backward


N, V, D = 12, 150, 8


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wants", [(), ("hidden",), ("weight",), ("hidden", "weight")], ids=str)
def test_frozen_skips_its_gemm(impl: Backend, op: str, wants: tuple[str, ...]) -> None:
    """Forward NVD; each wanted gradient NVD; the logprobs alone need their logits a second time."""
    if impl.name == "ref":
        pytest.skip("ref: torch's autograd decides")
    x = Linear(N, V, D, bias=False).draw(impl.device)
    forward, backward = walk(op, impl, x, wants, chunk_tokens=4)
    one = N * V * D
    if op == "linear_token_logprobs":
        assert forward.products == one
        assert backward.products == (len(wants) + 1) * one * bool(wants)
    else:
        assert forward.products == (1 + len(wants)) * one
        assert backward.products == 0


@pytest.mark.parametrize("op", OPS)
def test_skipped_rows_cost_no_gemm(impl: Backend, op: str) -> None:
    if impl.name == "ref":
        pytest.skip("ref: works on every row")
    x = Linear(N, V, D, bias=False).draw(impl.device)
    x["labels"][::2] = IGNORE
    forward, backward = walk(op, impl, x, ("hidden", "weight"), chunk_tokens=4)
    half = N * V * D // 2
    assert forward.products + backward.products == half * (4 if op == "linear_token_logprobs" else 3)


@pytest.mark.parametrize("op", OPS)
def test_no_buffer_of_tokens_by_vocabulary(impl: Backend, op: str) -> None:
    if impl.name == "ref":
        pytest.skip("ref: holds all logits")
    x = Linear(64, V, D, bias=False).draw(impl.device)
    for p in walk(op, impl, x, ("hidden", "weight"), chunk_tokens=8):
        most = 512 * -(-4 * 8 * V // 512)  # torch's GPU allocator hands out whole blocks of 512
        most = max(most, packed_bytes(x["weight"]), packed_bytes(x["weight"].t()))  # on a CPU
        assert p.largest <= most, f"{p.largest} bytes at once; a chunk has {4 * 8 * V}, N x V {4 * 64 * V}"


@pytest.mark.parametrize("op", ["linear_ppo_loss", "linear_nll"])
def test_second_backward_raises(impl: Backend, op: str) -> None:
    if impl.name == "ref":
        pytest.skip("ref: torch's autograd keeps what a second backward needs")
    x = Linear().draw(impl.device)
    hidden = leaf(x["hidden"])
    rest = (x["old"], x["advantages"]) if op == "linear_ppo_loss" else ()
    loss, _ = getattr(K, op)(hidden, x["weight"], x["labels"], *rest, impl=impl.name)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: a second backward"):
        torch.autograd.grad(loss, hidden)


def test_weight_gradient_over_many_chunks_in_bfloat16(impl: Backend) -> None:
    """64 chunks lose no more than one GEMM accumulated in float32 does (to 1.1 of it): the sum over chunks is
    float32."""
    if impl.name == "ref":
        pytest.skip("ref: one GEMM")
    rows = 64 if impl.interpreted else 512
    x = Linear(rows=rows, vocab=40, width=8, dtype="bfloat16", bias=False).draw(impl.device)
    errors = []
    for chunk in (rows // 64, rows):
        weight = leaf(x["weight"])
        loss, _ = K.linear_nll(x["hidden"], weight, x["labels"], normalizer=1.0, chunk_tokens=chunk, impl=impl.name)
        (d,) = torch.autograd.grad(loss, weight)
        full = x["hidden"].double().requires_grad_(False)
        w = x["weight"].double().requires_grad_()
        exact = torch.nn.functional.cross_entropy(full @ w.T, x["labels"], reduction="sum")
        truth = torch.autograd.grad(exact, w)[0]
        errors.append(abs(f64(d) - f64(truth)).max())
    assert errors[0] <= 1.1 * errors[1], f"64 chunks: {errors[0]:.3g}, one: {errors[1]:.3g}"


def test_nothing_counts(impl: Backend) -> None:
    x = Linear(5, 30, ignored=1.0).draw(impl.device)
    for op in ("linear_ppo_loss", "linear_nll"):
        hidden, weight = leaf(x["hidden"]), leaf(x["weight"])
        rest = (x["old"], x["advantages"]) if op == "linear_ppo_loss" else ()
        loss, metrics = getattr(K, op)(hidden, weight, x["labels"], *rest, impl=impl.name)
        all_zero(f"{op}: loss", loss)
        all_zero(f"{op}: metrics", metrics.tensor)
        for d in torch.autograd.grad(loss, [hidden, weight]):
            all_zero(f"{op}: gradient", d)


def test_equals_the_ops_it_fuses(impl: Backend) -> None:
    """linear_ppo_loss is ppo_loss of linear_token_logprobs."""
    x = Linear(19, 90, ignored=0.2, seed=9).draw(impl.device)
    keep = x["labels"] != IGNORE
    sides = []
    for fused in (True, False):
        hidden = leaf(x["hidden"])
        settings = dict(dual_clip=3.0, ref_logprobs=x["reference"], kl_coef=0.1, ent_coef=0.05, impl=impl.name)
        if fused:
            loss, m = K.linear_ppo_loss(
                hidden, x["weight"], x["labels"], x["old"], x["advantages"], chunk_tokens=4, **settings
            )
        else:
            logp, ent = K.linear_token_logprobs(hidden, x["weight"], x["labels"], return_entropy=True, impl=impl.name)
            settings["impl"] = "triton" if impl.name == "cuda" else impl.name  # tokens have no CUDA kernel
            loss, m = K.ppo_loss(logp, x["old"], x["advantages"], keep, entropy=ent, **settings)
        sides.append((loss, m.tensor, torch.autograd.grad(loss, hidden)[0]))
    for what, a, b in zip(("loss", "metrics", "dhidden"), *sides, strict=True):
        hold(what, a, f64(b), b)

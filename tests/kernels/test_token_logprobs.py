"""token_logprobs against float64, and the pitfalls that are its own."""

import os

import numpy as np
import ppomax_kernels as K
import pytest
import torch
from hypothesis import given
from ppomax_kernels.token_logprobs import BACKWARD
from ppomax_kernels.token_logprobs import FORWARD as TABLE
from ppomax_kernels.vocab_shard import FOREIGN

from . import oracle, strategies, verify
from .backends import Backend
from .cases import LOGITS, Logits
from .contract import LOGPROBS_LIMIT, all_zero, f64, hold, same_bits, within


@pytest.mark.parametrize("case", LOGITS, ids=str)
def test_oracle(impl: Backend, case: Logits) -> None:
    verify.token_logprobs(impl.bind(K.token_logprobs), case, impl.device)


@given(case=strategies.logits())
def test_drawn(impl: Backend, case: Logits) -> None:
    verify.token_logprobs(impl.bind(K.token_logprobs), case, impl.device)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_limit_at_32000(impl: Backend, temperature: float) -> None:
    rows = 8 if impl.interpreted else 192
    logits, labels, _, _ = Logits((rows,), 32000, "flat", temperature=temperature, seed=7).draw(impl.device)
    truth = oracle.token_logprobs_truth(f64(logits), labels.cpu().numpy(), temperature, None, -100)
    got = K.token_logprobs(logits, labels, temperature=temperature, return_entropy=True, impl=impl.name)
    for what, x, t in zip(("logprobs", "entropy"), got, truth, strict=True):
        within(f"{what} at V = 32000, float32", x, t, LOGPROBS_LIMIT)


def test_dead_row_and_label(impl: Backend) -> None:
    inf = float("inf")
    logits = torch.tensor(
        [[-inf, -inf, -inf], [-inf, 0.0, 0.0], [-inf, 5.0, -inf]], device=impl.device
    ).requires_grad_()
    labels = torch.tensor([1, 0, 1], device=impl.device)
    logprobs, entropy = K.token_logprobs(logits, labels, return_entropy=True, impl=impl.name)
    assert logprobs.tolist()[:2] == [-inf, -inf]
    same_bits("certain", logprobs[2], torch.zeros_like(logprobs[2]))
    assert entropy[0].item() == 0.0
    (d,) = torch.autograd.grad([logprobs, entropy], logits, [torch.ones_like(logprobs), torch.ones_like(entropy)])
    assert bool(torch.isfinite(d).all())
    all_zero("the gradient of a row of -inf", d[0])
    # d logp_y / d logits_y is 1 - p_y also where p_y is 0
    np.testing.assert_array_equal(f64(d[1]), [1.0, -0.5, -0.5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_show(impl: Backend, bad: float) -> None:
    logits = torch.zeros(3, 5, device=impl.device)
    logits[1, 3] = bad
    logprobs, entropy = K.token_logprobs(
        logits, torch.ones(3, dtype=torch.int64, device=impl.device), return_entropy=True, impl=impl.name
    )
    for x in (logprobs, entropy):
        assert torch.isnan(x).tolist() == [False, True, False]


def test_one_word(impl: Backend) -> None:
    logits = torch.tensor([[3.0], [-700.0]], device=impl.device).requires_grad_()
    out = K.token_logprobs(
        logits, torch.zeros(2, dtype=torch.int64, device=impl.device), return_entropy=True, impl=impl.name
    )
    (d,) = torch.autograd.grad([x.sum() for x in out], logits)
    for x in (*out, d):
        all_zero("V = 1", x)


def test_alone_or_among_many(impl: Backend) -> None:
    """Batch invariance: to the bit, forward and backward, whatever the other rows and the strides are."""
    case = Logits((9,) if impl.interpreted else (67,), 1500, seed=3)
    logits, labels, dlp, dent = case.draw(impl.device)

    def run(rows: slice) -> list[torch.Tensor]:
        x = verify.leaf(logits[rows])
        out = K.token_logprobs(x, labels[rows], temperature=0.8, return_entropy=True, impl=impl.name)
        return [*out, *torch.autograd.grad(list(out), x, [dlp[rows], dent[rows]])]

    every = run(slice(None))
    for rows in (slice(0, 1), slice(5, 6), slice(2, 8), slice(1, None, 3)):
        for what, part, whole in zip(("logprobs", "entropy", "dlogits"), run(rows), every, strict=True):
            same_bits(f"{what} of rows {rows}", part, whole[rows])


def test_label_of_another_shard(impl: Backend) -> None:
    """FOREIGN: logprob 0, entropy and logsumexp as usual, and a gradient without the label's own term."""
    if impl.name not in BACKWARD:
        pytest.skip(f"{impl.name}: no vocabulary shards in the reference")
    logits, labels, dlp, dent = Logits((4,), 131, seed=2).draw(impl.device)
    other = labels.clone()
    other[1] = FOREIGN
    results = []
    for y in (labels, other):
        logprobs, entropy, lse = TABLE[impl.name](logits, y, 1.0, 0.0, True, -100)
        d = BACKWARD[impl.name](dlp, dent, logits, y, lse, entropy, 1.0, 0.0, -100)
        results.append((logprobs, entropy, lse, d))
    (logprobs, *usual, d), (foreign, *same, d_foreign) = results
    for a, b in zip(usual, same, strict=True):
        same_bits("entropy, logsumexp", a, b)
    same_bits("logprobs", foreign, logprobs.masked_fill(other == FOREIGN, 0.0))
    at = (1, int(labels[1]))
    hold("the label's own term", d[at] - d_foreign[at], f64(dlp[1]), dlp[1])
    d[at] = d_foreign[at]
    same_bits("every other term", d, d_foreign)


def test_gradient_over_the_logits(impl: Backend) -> None:
    """The fused linear ops write dlogits over the logits: `out` may be the logits themselves."""
    if impl.name not in BACKWARD:
        pytest.skip(f"{impl.name}: its gradient is torch's own")
    for case in (
        Logits((4,), 1025, temperature=0.7),
        Logits((4,), 130, "inf", "bfloat16"),
        Logits((5,), 77, softcap=9.0, ignored=0.5),
    ):
        logits, labels, dlp, dent = case.draw(impl.device)
        logits = logits.nan_to_num(0.0, neginf=-torch.inf) if case.ignored else logits
        options = case.temperature, case.softcap or 0.0
        _, entropy, lse = TABLE[impl.name](logits, labels, *options, True, -100)
        fresh = BACKWARD[impl.name](dlp, dent, logits, labels, lse, entropy, *options, -100)
        over = logits.clone()
        same = BACKWARD[impl.name](dlp, dent, over, labels, lse, entropy, *options, -100, over)
        assert same.data_ptr() == over.data_ptr()
        same_bits("in place", over, fresh)


def test_rows_far_apart(impl: Backend) -> None:
    """Offsets beyond 2^31 elements; only the pages of three rows are touched."""
    if impl.interpreted:
        pytest.skip("triton: the interpreter copies the whole storage of a tensor, 4 GiB here")
    vocab, far = 1025, 2**30 + 512
    try:
        buffer = torch.empty(2 * far + vocab, dtype=torch.bfloat16, device=impl.device)
    except RuntimeError as error:
        pytest.skip(f"{impl.name}: no 4 GiB of address space here ({error})")
    logits = buffer.as_strided((3, vocab), (far, 1))
    near, labels, dlp, dent = Logits((3,), vocab, "peaked", "bfloat16").draw(impl.device)
    logits.copy_(near)
    both = []
    for x in (logits, near):
        x = verify.leaf(x)
        out = K.token_logprobs(x, labels, return_entropy=True, impl=impl.name)
        both.append([*out, *torch.autograd.grad(list(out), x, [dlp, dent])])
    for what, a, b in zip(("logprobs", "entropy", "dlogits"), *both, strict=True):
        same_bits(what, a, b)


@pytest.mark.slow
def test_gradient_beyond_2_31(impl: Backend) -> None:
    """N*V > 2^31 in one contiguous gradient; 9 GiB."""
    if impl.interpreted:
        pytest.skip("triton: too slow in the interpreter")
    free = (
        torch.cuda.mem_get_info()[0]
        if impl.device == "cuda"
        else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if free < 12 * 2**30 or impl.name == "ref":
        pytest.skip(f"{impl.name}: {free / 2**30:.0f} GiB free, 12 needed (ref: several times that)")
    rows, vocab = 2**31 // 50257 + 3, 50257
    row = torch.randn(vocab, dtype=torch.float32).to(impl.device, torch.float16)
    logits = row.expand(rows, vocab).requires_grad_()
    labels = torch.full((rows,), 7, device=impl.device)
    logprobs = K.token_logprobs(logits, labels, impl=impl.name)
    (d,) = torch.autograd.grad(logprobs.sum(), logits)
    for at in (1, rows // 2, rows - 1):
        same_bits("a row beyond 2^31", d[at], d[0])


def test_many_rows(impl: Backend) -> None:
    """More rows than a grid's second axis takes."""
    rows = 70000 if not impl.interpreted else 60
    logits, labels, _, _ = Logits((rows,), 3, seed=1).draw(impl.device)
    truth = oracle.token_logprobs_truth(f64(logits), labels.cpu().numpy(), 1.0, None, -100)[0]
    within("logprobs", K.token_logprobs(logits, labels, impl=impl.name), truth, LOGPROBS_LIMIT)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_the_reference(softcap: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (4.0 * torch.randn(3, 7, generator=g, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, -100, 6])

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return K.token_logprobs(x, labels, temperature=0.7, softcap=softcap, return_entropy=True, impl="ref")

    assert torch.autograd.gradcheck(run, (logits,))

"""One token a row from softmax(logits / temperature), cut to the k most likely tokens and then to the smallest set of
mass top_p. The draw is an inverse CDF in index order with one uniform a row from Philox4x32-10(key = seed, counter =
position): a row's token depends on its logits, seed and position alone, never on the batch. The cuts are threshold
searches on the values, not sorts. Returned with the token: its log-probability under the distribution drawn from
(what a PPO ratio must be built on), and log-probability and entropy under softmax(logits). Reads the logits once to a
few times (they stay in cache), writes 20 B a row."""

import torch
from torch import Tensor

from . import checks, raw
from .backends import reference
from .dispatch import Table, late, pick
from .library import primitive

FORWARD: Table = {
    "cpu": late("backends.native", "sample_cpu"),
    "triton": late("sample_triton", "sample_triton"),
    "ref": reference.sample,
}


def _forward(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw.place("sample", impl, logits, seeds, positions)
    raw.rows("sample", logits, seeds)
    raw.each("sample", len(logits), seeds, positions)
    raw.typed("sample", torch.int64, positions)
    return FORWARD[impl](logits, seeds, positions, temperature, top_k, top_p)  # type: ignore[no-any-return]


def _shapes(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (logits.shape[0],)
    token = logits.new_empty(rows, dtype=torch.int64)
    return token, *(logits.new_empty(rows, dtype=torch.float32) for _ in range(3))  # type: ignore[return-value]


sample_op = primitive(
    "sample", _forward, _shapes, "(Tensor token, Tensor logprob, Tensor plain_logprob, Tensor entropy)"
)


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.multinomial(softmax(cut(logits / temperature)), 1)` for each row, with a random stream of its own for
    each row.

    logits: (B, V) float32, bfloat16 or float16; the last dimension contiguous, rows may be strided. -inf is never
    drawn.
    seeds: (B,) int64, one for each sequence. positions: (B,) int64, how many tokens it has drawn already. The pair
    decides the draw.
    temperature: >= 0; 0 takes the most likely token (the first of equals; logprob 0). top_k: 0 keeps all; ties with
    the k-th are kept.
    top_p: in (0, 1], applied to what top_k left; the most likely tokens up to the one that reaches the mass, and its
    ties, are kept.
    Returns token (B,) int64; logprob (B,) of the distribution drawn from; plain_logprob (B,) and entropy (B,) of
    softmax(logits), which is the distribution at temperature 1 without cuts; float32, nats. Not differentiable: a
    logits tensor that requires a gradient is refused while gradients are on.
    Raises TypeError for dtypes, ValueError for the rest, and on a CPU for a row with NaN or nothing above -inf; on a
    GPU such a row gives token -1 and NaN. Source of the generator: Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3" (2011).
    """
    op = "sample"
    checks.tensor(op, logits=logits, seeds=seeds, positions=positions)
    checks.same_device(op, "logits", logits, seeds=seeds, positions=positions)
    checks.floating(op, impl, logits=logits)
    checks.dtype(op, "seeds", seeds, torch.int64)
    checks.dtype(op, "positions", positions, torch.int64)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"{op}: logits must have shape (B, V) with V >= 1, got {tuple(logits.shape)}; take the last position of "
            "each sequence"
        )
    checks.same_shape(op, "the rows of logits", logits.shape[:1], seeds=seeds, positions=positions)
    checks.unit_stride(op, "logits", logits)
    checks.contiguous(op, seeds=seeds, positions=positions)
    checks.number(op, "temperature", temperature, 0.0, float("inf"))
    if top_k < 0:
        raise ValueError(f"{op}: top_k must be >= 0 (0 keeps every token), got {top_k}")
    checks.number(op, "top_p", top_p, 0.0, 1.0, open_low=True)
    checks.no_gradient(op, logits=logits)
    name = pick(op, impl, logits.device, FORWARD)
    if name == "ref":
        return reference.sample(logits, seeds, positions, temperature, top_k, top_p)
    return sample_op(logits, seeds, positions, float(temperature), int(top_k), float(top_p), name)  # type: ignore[no-any-return]

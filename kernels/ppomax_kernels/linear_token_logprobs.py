"""Log-probability of each label and entropy of each row, straight from hidden states and the head's weight, without
an (N, V) buffer. logits = hidden @ weight.T + bias, chunk by chunk; then the row kernel of token_logprobs.py. The
backward makes each chunk's logits again: 2NVD FLOPs forward, 6NVD backward, memory O(N + chunk) and a float32 (V, D)
weight gradient. GEMMs are torch's. If the loss is PPO's or a plain NLL, `linear_ppo_loss` and `linear_nll` need no
second look at the logits: 6NVD in all."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunks, reference
from .chunks import NONE_IGNORED as NONE
from .chunks import Gradients, Logits, Tile
from .dispatch import pick
from .library import differentiable, primitive
from .linear_loss import gradient_shapes, wants_gradient
from .token_logprobs import BACKWARD, FORWARD
from .vocab_shard import VocabShard


def rows_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    entropy: bool,
    ignore_index: int,
    kept: int,
    chunk: int,
    invariant: bool,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks.check_labels("linear_token_logprobs", labels, weight, ignore_index, shard)
    n_all = hidden.shape[0]
    f32 = torch.float32
    index, n = chunks.kept_rows(labels != ignore_index, kept)
    chunk, tile = chunks.blocks(chunk, n, weight, invariant)
    logits = Logits(weight, bias, chunk, n, invariant, tile)
    want = entropy or shard is not None
    logprobs, ent, lse = (hidden.new_zeros(n, dtype=f32) for n in (n_all, n_all if want else 0, n_all))
    local = labels if shard is None else shard.local_labels(labels, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunks.row_chunks(index, n, chunk):
            h, y = rows.of(hidden), rows.of(local)
            parts, tile_labels = [], [t.labels(y) for t in logits.tiles]
            for t, own in zip(logits.tiles, tile_labels, strict=True):
                parts.append(FORWARD[impl](logits.of(h, t), own, temperature, softcap, want or not t.whole, NONE))
            stats = chunks.joined(parts, tile_labels)
            if shard is not None:
                stats = shard.combine(y, *stats)
            for whole, part in zip((logprobs, ent, lse), stats, strict=True):
                if whole.numel():
                    rows.put(whole, part)
    return logprobs, ent, lse


def rows_backward(
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    kept: int,
    chunk: int,
    invariant: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    index, n = chunks.kept_rows(labels != ignore_index, kept)
    chunk, tile = chunks.blocks(chunk, n, weight, invariant)
    grads = Gradients(hidden, weight, (need_hidden, need_weight, need_bias), n)
    logits = Logits(weight, bias, chunk, n, invariant, tile)
    local = labels if shard is None else shard.local_labels(labels, ignore_index)

    def dlogits(t: Tile, h: Tensor, y: Tensor, upstream: tuple[Any, Any], stats: tuple[Tensor, Tensor]) -> Tensor:
        z = logits.of(h, t)
        return BACKWARD[impl](*upstream, z, t.labels(y), *stats, temperature, softcap, NONE, z)  # type: ignore[no-any-return]

    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunks.row_chunks(index, n, chunk):
            h, y = rows.of(hidden), rows.of(local)
            known = (
                (rows.of_maybe(dlogprobs), rows.of_maybe(dentropy)),
                (rows.of(lse), rows.of(entropy) if dentropy is not None else entropy),
            )
            if len(logits.tiles) == 1:
                grads.add(dlogits(logits.tiles[0], h, y, *known), h, rows, logits)
            else:
                grads.add_tiles(((t, dlogits(t, h, y, *known)) for t in logits.tiles), h, rows)
    if shard is not None and need_hidden:
        shard.sum(grads.dhidden)
    return grads.dhidden, grads.dweight, grads.dbias


def _forward_shapes(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n = labels.shape
    f32 = torch.float32
    return (
        hidden.new_empty(n, dtype=f32),
        hidden.new_empty(n if rest[2] else (0,), dtype=f32),
        hidden.new_empty(n, dtype=f32),
    )


def _backward_shapes(
    dlogprobs: Tensor | None, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return gradient_shapes(hidden, weight, *rest[-4:-1])


_HEAD = "float temperature, float softcap"
_WALK = "int ignore_index, int kept, int chunk, bool invariant"
linear_token_logprobs_fwd = primitive(
    f"linear_token_logprobs_fwd(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {_HEAD}, bool entropy, "
    f"{_WALK}, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    rows_forward,
    _forward_shapes,
)
linear_token_logprobs_bwd = primitive(
    "linear_token_logprobs_bwd(Tensor? dlogprobs, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor labels, "
    "Tensor lse, Tensor entropy,"
    f" Tensor? bias, {_HEAD}, {_WALK}, bool need_hidden, bool need_weight, bool need_bias, str impl) -> (Tensor, "
    "Tensor, Tensor)",
    rows_backward,
    _backward_shapes,
)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        temperature, softcap, entropy, ignore_index, kept, chunk, invariant, impl, shard = rest
        args: tuple[Any, ...] = (
            hidden,
            weight,
            labels,
            bias,
            temperature,
            softcap,
            entropy,
            ignore_index,
            kept,
            chunk,
            invariant,
            impl,
        )
        logprobs, ent, lse = linear_token_logprobs_fwd(*args) if shard is None else rows_forward(*args, shard=shard)
        ctx.save_for_backward(hidden, weight, bias, labels, lse, ent)
        ctx.scalars = temperature, softcap, ignore_index, kept, chunk, invariant
        ctx.impl, ctx.shard = impl, shard
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logprobs, ent, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse, entropy = ctx.saved_tensors
        if entropy.numel() != lse.numel():
            dentropy = None
        need = ctx.needs_input_grad[:3]
        args: tuple[Any, ...] = (
            dlogprobs,
            dentropy,
            hidden,
            weight,
            labels,
            lse,
            entropy,
            bias,
            *ctx.scalars,
            *need,
            ctx.impl,
        )
        grads = linear_token_logprobs_bwd(*args) if ctx.shard is None else rows_backward(*args, shard=ctx.shard)
        return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *(None,) * 10


def _compose(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    entropy: bool,
    ignore_index: int,
    kept: int,
    chunk: int,
    invariant: bool,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (temperature, softcap, entropy, ignore_index, kept, chunk, invariant, impl)
    if wants_gradient(hidden, weight, bias):
        return _LinearTokenLogprobs.apply(hidden, weight, bias, labels, *rest, shard)  # type: ignore[no-any-return, no-untyped-call]
    if shard is not None:
        return rows_forward(hidden, weight, labels, bias, *rest, shard=shard)
    return linear_token_logprobs_fwd(hidden, weight, labels, bias, *rest)  # type: ignore[no-any-return]


linear_token_logprobs_op = differentiable(
    f"linear_token_logprobs(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {_HEAD}, bool entropy, "
    f"{_WALK}, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    _compose,
)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = -100,
    kept: int | None = None,
    chunk_tokens: int | None = None,
    batch_invariant: bool = False,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs(hidden @ weight.T + bias, labels)`, and the entropy of each row, without ever holding N x V
    logits.

    hidden: (N, D); weight: (V, D), as torch.nn.Linear stores it; bias: (V,); all of one dtype, float32, bfloat16 or
    float16. labels: (N,) int64,
        0 <= label < V, or `ignore_index`: such rows give 0, gradient 0, and cost no GEMM work.
    temperature, softcap, return_entropy: as in `token_logprobs`. Returns logprobs (N,) float32, or (logprobs,
    entropy); differentiable with
        respect to hidden, weight and bias (the GEMM of a gradient that nobody wants is skipped; the weight's is
        summed in float32).
    kept: the number of rows that are not ignored, if known; on a GPU this saves the one time that the host waits for
    the device.
    chunk_tokens: tokens per GEMM; by default a pure function of V and the device.
    batch_invariant: every GEMM has one shape (the last chunk is padded), so that a row's results do not depend, to
    the bit, on the other rows.
    shard: weight and bias are this rank's rows of a vocabulary split over a process group (`VocabShard.of(weight,
    group)`); labels and hidden are
        the same on every rank, which all call. hidden's gradient comes summed over the ranks.
    Logits of a chunk are rounded to the dtype of hidden, as in eager torch. Under torch.autocast inputs are cast as
    for torch.nn.Linear.
    Raises TypeError for dtypes, ValueError for the rest; labels are checked on a CPU; on a GPU a label outside [0, V)
    gives NaN.
    """
    op = "linear_token_logprobs"
    hidden, weight, bias = chunks.cast_for_autocast(hidden, weight, bias)  # type: ignore[assignment]
    chunks.check(op, impl, hidden, weight, labels, bias, chunk_tokens, kept)
    cap = chunks.check_head(op, temperature, softcap, weight, shard)
    name = pick(op, impl, hidden.device, FORWARD)
    if name == "ref":
        chunks.refuse_shard(op, shard)
        chunks.check_labels(op, labels, weight, ignore_index, None)
        logprobs, entropy, _ = reference.linear_token_logprobs(
            hidden, weight, labels, bias, temperature, cap, return_entropy, ignore_index
        )
    else:
        logprobs, entropy, _ = _compose(
            hidden, weight, labels, bias, float(temperature), cap, return_entropy, ignore_index, -1 if kept is None
            else kept, chunk_tokens or 0, batch_invariant, name, shard=shard,
        )  # fmt: skip
    return (logprobs, entropy) if return_entropy else logprobs

"""Log-probability of each label and entropy of each row, straight from hidden states and the head's weight, without
an (N, V) buffer. logits = hidden @ weight.T + bias, chunk by chunk; then the row kernel of token_logprobs.py. The
backward makes each chunk's logits again: 2NVD FLOPs forward, 6NVD backward, memory O(N + chunk) and a float32 (V, D)
weight gradient. GEMMs are torch's. If the loss is PPO's or a plain NLL, `linear_ppo_loss` and `linear_nll` need no
second look at the logits: 6NVD in all."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import chunks, raw
from .backends import reference
from .chunks import NONE_IGNORED as NONE
from .chunks import Gradients, Logits, Tile
from .dispatch import pick
from .library import differentiable, first_derivative, primitive, split
from .linear_loss import gradient_shapes, wants_gradient
from .terms import Head, LinearInputs, Need, SavedRows, Upstream, Walk
from .token_logprobs import BACKWARD, FORWARD
from .vocab_shard import VocabShard


def rows_forward(
    inputs: LinearInputs, head: Head, walk: Walk, entropy: bool, impl: str, *, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, bias = inputs
    chunks.check_labels("linear_token_logprobs", labels, weight, head.ignore_index, shard)
    n_all = hidden.shape[0]
    f32 = torch.float32
    raw.linear("linear_token_logprobs", impl, inputs)
    index, n = chunks.kept_rows(labels != head.ignore_index, walk.kept)
    chunk, tile = chunks.blocks(walk.chunk, n, weight, walk.invariant)
    logits = Logits(weight, bias, n, walk._replace(chunk=chunk), impl, tile)
    want = entropy or shard is not None
    logprobs, ent, lse = (hidden.new_zeros(n, dtype=f32) for n in (n_all, n_all if want else 0, n_all))
    local = labels if shard is None else shard.local_labels(labels, head.ignore_index)
    numbers = head.temperature, head.softcap
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunks.row_chunks(index, n, chunk):
            h, y = rows.of(hidden), rows.of(local)
            parts, tile_labels = [], [t.labels(y) for t in logits.tiles]
            for t, own in zip(logits.tiles, tile_labels, strict=True):
                parts.append(FORWARD[impl](logits.of(h, t), own, *numbers, want or not t.whole, NONE))
            stats = chunks.joined(parts, tile_labels)
            if shard is not None:
                stats = shard.combine(y, *stats)
            for whole, part in zip((logprobs, ent, lse), stats, strict=True):
                if whole.numel():
                    rows.put(whole, part)
    return logprobs, ent, lse


def rows_backward(
    upstream: Upstream,
    inputs: LinearInputs,
    saved: SavedRows,
    head: Head,
    walk: Walk,
    need: Need,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, bias = inputs
    op, a_row = "linear_token_logprobs", (*upstream, saved.lse, None if upstream.dentropy is None else saved.entropy)
    raw.linear(op, impl, inputs)
    raw.place(op, impl, labels, *a_row)
    raw.typed(op, torch.float32, *a_row)
    if any(x is not None and x.shape != labels.shape for x in a_row):
        raise ValueError(f"{op}: lse, entropy and gradients must have the shape {tuple(labels.shape)} of labels")
    index, n = chunks.kept_rows(labels != head.ignore_index, walk.kept)
    chunk, tile = chunks.blocks(walk.chunk, n, weight, walk.invariant)
    grads = Gradients(hidden, weight, need, n, impl)
    logits = Logits(weight, bias, n, walk._replace(chunk=chunk), impl, tile)
    local = labels if shard is None else shard.local_labels(labels, head.ignore_index)
    numbers = head.temperature, head.softcap

    def dlogits(t: Tile, h: Tensor, y: Tensor, given: Upstream, known: SavedRows) -> Tensor:
        z = logits.of(h, t)
        return BACKWARD[impl](*given, z, t.labels(y), *known, *numbers, NONE, z)  # type: ignore[no-any-return]

    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunks.row_chunks(index, n, chunk):
            h, y = rows.of(hidden), rows.of(local)
            given = Upstream(rows.of_maybe(upstream.dlogprobs), rows.of_maybe(upstream.dentropy))
            entropy = saved.entropy if upstream.dentropy is None else rows.of(saved.entropy)
            known = SavedRows(rows.of(saved.lse), entropy)
            if len(logits.tiles) == 1:
                grads.add(dlogits(logits.tiles[0], h, y, given, known), h, rows, logits)
            else:
                grads.add_tiles(((t, dlogits(t, h, y, given, known)) for t in logits.tiles), h, rows)
    if shard is not None and need.need_hidden:
        shard.sum(grads.dhidden)
    return grads.dhidden, grads.dweight, grads.dbias


def _forward_shapes(
    inputs: LinearInputs, head: Head, walk: Walk, entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, n, f32 = inputs.hidden, inputs.labels.shape, torch.float32
    return (
        hidden.new_empty(n, dtype=f32),
        hidden.new_empty(n if entropy else (0,), dtype=f32),
        hidden.new_empty(n, dtype=f32),
    )


def _backward_shapes(
    upstream: Upstream, inputs: LinearInputs, saved: SavedRows, head: Head, walk: Walk, need: Need, impl: str
) -> tuple[Tensor, ...]:
    return gradient_shapes(inputs.hidden, inputs.weight, need)


linear_token_logprobs_fwd = primitive(
    "linear_token_logprobs_fwd", rows_forward, _forward_shapes, "(Tensor, Tensor, Tensor)", by_torch=True
)
linear_token_logprobs_bwd = primitive(
    "linear_token_logprobs_bwd", rows_backward, _backward_shapes, "(Tensor, Tensor, Tensor)", by_torch=True
)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        entropy: bool,
        impl: str,
        shard: VocabShard | None,
        *flat: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """flat: the fields of Head, then those of Walk."""
        head, walk = split(flat, Head, Walk)
        inputs = LinearInputs(hidden, weight, labels, bias)
        if shard is None:
            logprobs, ent, lse = linear_token_logprobs_fwd(*inputs, *flat, entropy, impl)
        else:
            logprobs, ent, lse = rows_forward(inputs, head, walk, entropy, impl, shard=shard)
        ctx.save_for_backward(*inputs, lse, ent)
        ctx.head, ctx.walk, ctx.impl, ctx.shard = head, walk, impl, shard
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logprobs, ent, lse

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        inputs, saved = split(ctx.saved_tensors, LinearInputs, SavedRows)
        if saved.entropy.numel() != saved.lse.numel():
            dentropy = None
        upstream, need = Upstream(dlogprobs, dentropy), Need(*ctx.needs_input_grad[:3])
        groups = (upstream, inputs, saved, ctx.head, ctx.walk, need)
        if ctx.shard is None:
            grads = linear_token_logprobs_bwd(*chain.from_iterable(groups), ctx.impl)
        else:
            grads = rows_backward(*groups, ctx.impl, shard=ctx.shard)
        nothing = (None,) * (len(ctx.needs_input_grad) - len(grads))
        return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *nothing


def _compose(
    inputs: LinearInputs, head: Head, walk: Walk, entropy: bool, impl: str, *, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, bias = inputs
    if wants_gradient(hidden, weight, bias):
        return _LinearTokenLogprobs.apply(hidden, weight, bias, labels, entropy, impl, shard, *head, *walk)  # type: ignore[no-any-return, no-untyped-call]
    if shard is not None:
        return rows_forward(inputs, head, walk, entropy, impl, shard=shard)
    return linear_token_logprobs_fwd(*inputs, *head, *walk, entropy, impl)  # type: ignore[no-any-return]


linear_token_logprobs_op = differentiable("linear_token_logprobs", _compose, "(Tensor, Tensor, Tensor)")


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
    inputs = LinearInputs(hidden, weight, labels, bias)
    chunks.check(op, impl, inputs, chunk_tokens, kept)
    head = chunks.head_of(op, temperature, softcap, ignore_index, weight, shard)
    name = pick(op, impl, hidden.device, FORWARD)
    if name == "ref":
        chunks.refuse_shard(op, shard)
        chunks.check_labels(op, labels, weight, ignore_index, None)
        logprobs, entropy, _ = reference.linear_token_logprobs(inputs, head, return_entropy)
    else:
        walk = chunks.walk_of(kept, chunk_tokens or 0, batch_invariant)
        logprobs, entropy, _ = _compose(inputs, head, walk, return_entropy, name, shard=shard)
    return (logprobs, entropy) if return_entropy else logprobs

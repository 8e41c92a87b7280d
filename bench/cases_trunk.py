"""What a trunk does beside its large products, with our kernels in the engine: attention over packed sequences and over
pages, and the small ops of a layer at the rows of a decoding step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from ppomax_kernels.backends import reference
from ppomax_kernels.internal import packed_attention as packed
from ppomax_kernels.internal import paged_attention as paged
from ppomax_kernels.internal import paged_decode as decode
from ppomax_kernels.internal.gated_mul import gated_mul
from ppomax_kernels.internal.packed_linear import pack, packed_linear
from ppomax_kernels.internal.rms_norm import add_rms_norm, rms_norm
from ppomax_kernels.internal.rotate import rotate, rotate_pair
from ppomax_kernels.internal.silu_mul import silu_mul
from torch import Tensor
from torch.nn import functional as F

from .cases import draw, grad_of, tolerance
from .problem import Problem, Run, compiled, sized

EPS = 1e-6


def attention(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    """Of scoring and update on a CPU in float32; of a decoding step, on either device."""
    if device.type == "cpu" and dtype == torch.float32:
        yield from _packed(size)
    if device.type == "cuda" or dtype in (torch.float32, torch.bfloat16):
        yield _decoding(device, dtype, size)


# ---- packed sequences -----------------------------------------------------------------------------------------------


def _packed(size: str) -> Iterator[Problem]:
    sequences, longest, heads, groups, dim = sized(
        size, {"full": (16, 256, 8, 2, 64), "quick": (4, 32, 4, 2, 16), "tiny": (2, 3, 2, 1, 8)}
    )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 4 + 1, longest + 1, (sequences,), generator=generator).tolist()
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens, scale, cpu = int(ends[-1]), dim**-0.5, torch.device("cpu")
    inputs = [draw(cpu, torch.float32, tokens, n, dim, seed=i) for i, n in enumerate((heads, groups, groups))]
    leaves = [x.clone().requires_grad_() for x in inputs]
    up = draw(cpu, torch.float32, tokens, heads, dim, seed=3)
    rows = torch.arange(sequences).repeat_interleave(torch.tensor(lengths))
    slots = rows * longest + torch.arange(tokens) - ends[:-1].long()[rows]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed.packed_attention(q, k, v, ends, scale=scale)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_causal(*(x.transpose(0, 1)[None] for x in three))[0].transpose(0, 1) for three in each])

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = [
            x.new_zeros(sequences * longest, *x.shape[1:]).index_copy(0, slots, x).unflatten(0, (sequences, longest))
            for x in (q, k, v)
        ]
        return _causal(*(x.transpose(1, 2) for x in wide)).transpose(1, 2).flatten(0, 1)[slots]

    ways = {"ppomax cpu": ours, "SDPA, one by one": apart, "SDPA, padded": padded}
    exact = [x.double().requires_grad_() for x in inputs]
    flops = 4 * heads * dim * sum(n * (n + 1) // 2 for n in lengths)
    common: dict[str, Any] = dict(
        op="packed attention", dtype=torch.float32, shape=f"{tokens} in {sequences}, {heads}/{groups} heads of {dim}"
    )
    yield Problem(
        mode="forward",
        runs={name: lambda f=f: [f(*inputs)] for name, f in ways.items()},
        truth=lambda: [apart(*(x.detach() for x in exact))],
        tolerance=tolerance(torch.float32),
        flops=flops,
        **common,
    )
    yield Problem(
        mode="forward+backward",
        runs={name: grad_of(lambda f=f: [f(*leaves)], leaves, [up]) for name, f in ways.items()},
        truth=grad_of(lambda: [apart(*exact)], exact, [up.double()]),
        tolerance=tolerance(torch.float32),
        flops=7 * flops // 2,
        **common,
    )


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, D) with grouped heads, which are repeated: the fast ways of SDPA take no groups everywhere."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# ---- pages ----------------------------------------------------------------------------------------------------------


def _decoding(device: torch.device, dtype: torch.dtype, size: str) -> Problem:
    """One token of each sequence over its pages, positions between half of the context and all of it."""
    gpu = device.type == "cuda"
    full = (256, 1024, 32, 8, 128) if gpu else (64, 512, 8, 2, 64)
    count, context, heads, groups, dim = sized(
        size, {"full": full, "quick": (8, 64, 4, 2, 16), "tiny": (2, 5, 2, 1, 8)}
    )
    page = 32 if gpu else paged.PAGE
    blocks, scale = -(-context // page), dim**-0.5
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(context // 2, context, (count,), generator=generator).int().to(device)
    tables = torch.randperm(count * blocks, generator=generator).int().view(count, blocks).to(device)
    query, key, value = (draw(device, dtype, count, n, dim, seed=i) for i, n in enumerate((heads, groups, groups)))
    past = [draw(device, dtype, count, groups, blocks * page, dim, seed=3 + i) for i in range(2)]
    sequences = torch.arange(count, dtype=torch.int32, device=device)
    make = decode.empty_row_pages if gpu else paged.empty_pages
    widths = (groups, page, dim) if gpu else (groups, dim, dim)
    keys, values = make(count * blocks, *widths, dtype, device)  # type: ignore[operator]
    for pages, known, transposed in ((keys, past[0], not gpu), (values, past[1], False)):
        cut = known.view(count, groups, blocks, page, dim).transpose(1, 2).flatten(0, 1)
        pages[tables.flatten().long()] = cut.transpose(2, 3) if transposed else cut
    run, plain = (
        (decode.paged_decode, reference.paged_decode) if gpu else (paged.paged_attention, reference.paged_attention)
    )
    given = (query, key, value, keys, values, tables, sequences, positions)

    def gathered() -> Sequence[Tensor]:
        """Each sequence's pages side by side, then SDPA with a mask."""
        found = []
        for pages, new, transposed in ((keys, key, not gpu), (values, value, False)):
            rows = pages[tables.long()]
            rows = (rows.transpose(3, 4) if transposed else rows).transpose(1, 2).flatten(2, 3).clone()
            rows[torch.arange(count, device=device), :, positions.long()] = new
            found.append(rows.repeat_interleave(heads // groups, 1))
        seen = torch.arange(blocks * page, device=device) <= positions[:, None]
        return [F.scaled_dot_product_attention(query[:, :, None], *found, attn_mask=seen[:, None, None])[:, :, 0]]

    name = "triton" if gpu else "cpu"
    attended = int((positions + 1).sum())
    return Problem(
        op="attention of decoding",
        mode="forward",
        dtype=dtype,
        shape=f"{count} at {attended // count}, {heads}/{groups} heads of {dim}",
        runs={
            f"ppomax {name}": lambda: [run(*given, scale=scale, impl=name)],
            "gather + SDPA": gathered,
        },
        truth=lambda: [plain(*(x.double() if x.is_floating_point() else x for x in given), scale, 0, 0.0)],
        tolerance=tolerance(dtype),
        bytes=(2 * attended * groups * dim + 2 * query.numel()) * query.element_size(),
    )


# ---- small ops ------------------------------------------------------------------------------------------------------


def trunk(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    """Norm, gate, rotary embedding, and on a CPU the product of few rows, of a decoding step."""
    gpu = device.type == "cuda"
    if not gpu and dtype == torch.float16:
        return
    full = (256, 4096, 32, 128) if gpu else (64, 2048, 16, 128)
    rows, width, heads, dim = sized(size, {"full": full, "quick": (8, 64, 4, 16), "tiny": (2, 32, 2, 8)})
    x, delta = draw(device, dtype, rows, width), draw(device, dtype, rows, width, seed=1)
    weight = 1 + draw(device, dtype, width, scale=0.1, seed=2)
    both = draw(device, dtype, rows, 2 * width, seed=3)
    angles = draw(device, torch.float32, 1, rows, dim // 2, seed=4).repeat(1, 1, 2)
    turns = [angles.cos().to(dtype), angles.sin().to(dtype)]
    heads_ = draw(device, dtype, 1, rows, heads, dim, seed=5).transpose(1, 2)
    item = x.element_size()

    def problem(
        op: str, own: Callable[..., Any], eager: Callable[..., Any], given: Sequence[Tensor], **more: Any
    ) -> Problem:
        fast = compiled(eager)
        runs: dict[str, Run] = {
            f"ppomax {'triton' if gpu else 'cpu'}": lambda: _listed(own(*given)),
            "eager": lambda: _listed(eager(*given)),
            "compile": lambda: _listed(fast(*given)),
        }
        shape = more.pop("shape", "x".join(map(str, given[0].shape)))
        truth: Run = lambda: _listed(eager(*(t.double() for t in given)))  # noqa: E731
        return Problem(
            op=op, mode="forward", dtype=dtype, shape=shape, runs=runs, truth=truth, tolerance=tolerance(dtype),
            needs_compile=frozenset({"compile"}), **more,
        )  # fmt: skip

    if gpu:
        yield problem(
            "sum and norm", lambda a, b, w: add_rms_norm(a, b, w, eps=EPS, impl="triton"),
            lambda a, b, w: (a + b, _norm(a + b, w)), [x, delta, weight], bytes=4 * x.numel() * item,
        )  # fmt: skip
        yield problem(
            "gate",
            lambda b: gated_mul(*b.chunk(2, -1), "silu", impl="triton"),
            _gate,
            [both],
            bytes=3 * x.numel() * item,
        )
        yield problem(
            "rotary embedding", lambda q, c, s: rotate_pair(q, q[:, : heads // 4], c, s, impl="triton"),
            lambda q, c, s: (_turn(q, c, s), _turn(q[:, : heads // 4], c, s)), [heads_, *turns],
            bytes=5 * heads_.numel() // 2 * item,
        )  # fmt: skip
        return
    yield problem("norm", lambda a, w: rms_norm(a, w, eps=EPS), _norm, [x, weight], bytes=2 * x.numel() * item)
    yield problem("gate", silu_mul, _gate, [both], bytes=3 * x.numel() * item)
    if dtype == torch.float32:
        yield problem("rotary embedding", rotate, _turn, [heads_, *turns], bytes=2 * heads_.numel() * item)
    matrix = draw(device, dtype, 3 * width, width, scale=width**-0.5, seed=6)
    panels = pack(matrix)
    yield problem(
        "product of few rows", lambda a, w: packed_linear(a, panels, None, len(w)), F.linear, [x, matrix],
        bytes=matrix.numel() * item, flops=2 * rows * matrix.numel(), shape=f"{rows}x{width}x{3 * width}",
    )  # fmt: skip


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def _gate(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat([-right, left], -1) * sine[:, None]


def _listed(found: Any) -> Sequence[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]

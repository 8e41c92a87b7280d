"""The ops on tokens: what is timed, on which shapes, against whom. Fused linear ops: cases_linear.py; cost of a
call: cases_call.py."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ppomax_kernels as K
import torch
from ppomax_kernels.gae import FORWARD as GAE
from ppomax_kernels.token_logprobs import FORWARD as LOGPROBS
from torch import Tensor

from . import machine, rivals
from .problem import SHAPES, Problem, compiled, ours, sized

CHECKED_ROWS = 32


def draw(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (scale * torch.randn(*shape, device=device, generator=generator)).to(dtype)


def integers(device: torch.device, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def named(
    names: Sequence[str], make: Callable[[str], Callable[[], Sequence[Tensor]]]
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    return {f"ppomax {name}": make(name) for name in names}


def grad_of(
    function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], up: Sequence[Tensor] | None = None
) -> Callable[[], Sequence[Tensor]]:
    return lambda: torch.autograd.grad(list(function()), list(inputs), None if up is None else list(up))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float64: 1e-12}[dtype]


def token_logprobs(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    full = (8192, 151936) if device.type == "cuda" else (1024, 32000)
    if size in SHAPES:
        full = 8192 if device.type == "cuda" else 256, SHAPES[size][1]
    n, v = sized(size, {"full": full, "quick": (64, 4000), "tiny": (2, 64)})
    logits, labels = draw(device, dtype, n, v, scale=2.0), integers(device, v, n)
    up = [draw(device, torch.float32, n, seed=seed) for seed in (1, 2)]
    leaf, few = logits.detach().requires_grad_(), slice(0, CHECKED_ROWS)
    names, missing = ours(device, LOGPROBS)
    exact = logits[few].double().requires_grad_()

    def forward(name: str) -> Callable[[], Sequence[Tensor]]:
        return lambda: K.token_logprobs(logits, labels, return_entropy=True, impl=name)

    def backward(name: str) -> Callable[[], Sequence[Tensor]]:
        return grad_of(lambda: K.token_logprobs(leaf, labels, return_entropy=True, impl=name), [leaf], up)

    eager = rivals.logprobs_entropy
    fast = compiled(eager), compiled(eager)
    common: dict[str, Any] = dict(
        op="token_logprobs", dtype=dtype, shape=f"{n}x{v}", missing=missing, needs_compile=frozenset({"compile"})
    )
    read = n * v * logits.element_size()
    bare = (
        {} if device.type == "cuda" else {"threaded read alone": lambda: [torch.tensor(machine.read(logits) % 2**31)]}
    )
    yield Problem(
        mode="forward",
        runs={
            **named(names, forward),
            "eager": lambda: eager(logits, labels),
            "compile": lambda: fast[0](logits, labels),
            **bare,
        },
        unchecked=frozenset(bare),
        truth=lambda: eager(exact.detach(), labels[few]),
        tolerance=1e-5,
        bytes=read,
        memory=True,
        **common,
    )
    yield Problem(
        mode="forward+backward",
        runs={
            **named(names, backward),
            "eager": grad_of(lambda: eager(leaf, labels), [leaf], up),
            "compile": grad_of(lambda: fast[1](leaf, labels), [leaf], up),
        },
        truth=grad_of(lambda: eager(exact, labels[few]), [exact], [u[few].double() for u in up]),
        tolerance=tolerance(dtype),
        bytes=3 * read,
        memory=True,
        **common,
    )


def gae(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    shapes = sized(size, {"full": [(64, 512), (128, 512)], "quick": [(8, 64)], "tiny": [(2, 8)]})
    names, missing = ours(device, GAE)
    missing = {**missing, "compile": "a Python loop over T has no fixed graph of useful size"}
    for b, t in shapes:
        rewards, values = draw(device, dtype, b, t), draw(device, dtype, b, t, seed=1)
        mask = torch.ones(b, t, dtype=torch.bool, device=device)
        loops = {"TRL": rivals.gae_loop_trl, "verl": rivals.gae_loop_verl, "OpenRLHF": rivals.gae_loop_openrlhf}

        def loop(
            f: Callable[..., Sequence[Tensor]], r: Tensor = rewards, v: Tensor = values, m: Tensor = mask
        ) -> Callable[[], Sequence[Tensor]]:
            return lambda: f(r, v, m, 0.99, 0.95)

        def own(name: str, r: Tensor = rewards, v: Tensor = values, m: Tensor = mask) -> Callable[[], Sequence[Tensor]]:
            return lambda: K.gae(r, v, mask=m, gamma=0.99, lam=0.95, impl=name)

        yield Problem(
            op="gae",
            mode="forward",
            dtype=dtype,
            shape=f"{b}x{t}",
            runs={**named(names, own), **{f"loop as in {who}": loop(f) for who, f in loops.items()}},
            truth=lambda r=rewards, v=values, m=mask: rivals.gae_loop_verl(r.double(), v.double(), m, 0.99, 0.95),
            tolerance=tolerance(dtype),
            bytes=b * t * (2 * rewards.element_size() + 9),
            missing=missing,
        )
    if size == "full" and device.type == "cuda":
        yield from _gae_packed(device, dtype, names, missing)


def _gae_packed(
    device: torch.device, dtype: torch.dtype, names: list[str], missing: dict[str, str]
) -> Iterator[Problem]:
    tokens = 32768
    for sequences in (1, 8, 64):
        rewards, values = draw(device, dtype, tokens), draw(device, dtype, tokens, seed=1)
        ends = torch.arange(0, tokens + 1, tokens // sequences, dtype=torch.int32, device=device)

        def own(name: str, r: Tensor = rewards, v: Tensor = values, e: Tensor = ends) -> Callable[[], Sequence[Tensor]]:
            return lambda: K.gae(r, v, e, gamma=0.99, lam=0.95, impl=name)

        def truth(r: Tensor = rewards, v: Tensor = values, s: int = sequences) -> list[Tensor]:
            r, v = r.double().cpu().view(s, -1), v.double().cpu().view(s, -1)
            return [x.reshape(-1) for x in rivals.gae_loop_trl(r, v, torch.ones_like(r), 0.99, 0.95)]

        yield Problem(
            op="gae",
            mode="forward, packed",
            dtype=dtype,
            shape=f"{tokens} in {sequences}",
            runs=named(names, own),
            truth=truth,
            tolerance=tolerance(dtype),
            bytes=tokens * (2 * rewards.element_size() + 8),
            missing={**missing, "loops": "too slow at this length"},
        )


def losses(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    """ppo_loss and value_loss, forward and backward."""
    b, t = sized(size, {"full": (64, 512), "quick": (4, 32), "tiny": (1, 4)})
    old, advantages = draw(device, dtype, b, t, scale=0.5), draw(device, dtype, b, t, seed=1)
    leaf = (old.float() + draw(device, torch.float32, b, t, scale=0.2, seed=2)).to(dtype).requires_grad_()
    mask = draw(device, torch.float32, b, t, seed=3) > -1.0
    names, missing = ours(device, {})
    pairs = {"ppo_loss": (K.ppo_loss, rivals.policy_loss), "value_loss": (K.value_loss, rivals.value_loss)}
    for op, (fused, eager) in pairs.items():

        def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor = leaf) -> Callable[[], Sequence[Tensor]]:
            def run() -> Sequence[Tensor]:
                loss = function(x)
                return loss, *torch.autograd.grad(loss, x)

            return run

        def own(name: str, f: Callable[..., tuple[Tensor, object]] = fused) -> Callable[[], Sequence[Tensor]]:
            return with_gradient(lambda x: f(x, old, advantages, mask, impl=name)[0])

        fast = compiled(eager)
        exact = leaf.detach().double().requires_grad_()
        yield Problem(
            op=op,
            mode="forward+backward",
            dtype=dtype,
            shape=f"{b}x{t}",
            runs={
                **named(names, own),
                "eager": with_gradient(lambda x, f=eager: f(x, old, advantages, mask)),
                "compile": with_gradient(lambda x, f=fast: f(x, old, advantages, mask)),
            },
            truth=with_gradient(lambda x, f=eager: f(x, old.double(), advantages.double(), mask), exact),
            tolerance=tolerance(dtype),
            bytes=b * t * (4 * old.element_size() + 1),
            missing=missing,
            needs_compile=frozenset({"compile"}),
        )


def elementwise(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    """kl_penalty, token_rewards, whiten: forward."""
    s, t = sized(size, {"full": (64, 512), "quick": (4, 32), "tiny": (1, 4)})
    n = s * t
    logprobs, ref, scores = draw(device, dtype, n), draw(device, dtype, n, seed=1), draw(device, dtype, s, seed=2)
    ends = torch.arange(0, n + 1, t, dtype=torch.int32, device=device)
    mask = draw(device, torch.float32, n, seed=3) > -1.0
    names, missing = ours(device, {})
    ops = {
        "kl_penalty": (
            lambda a, b, c, i: K.kl_penalty(a, b, estimator="k3", impl=i),
            lambda a, b, c: rivals.kl_k3(a, b),
            2,
        ),
        "token_rewards": (
            lambda a, b, c, i: K.token_rewards(c, a, b, ends, kl_coef=0.1, impl=i),
            lambda a, b, c: rivals.token_rewards(c, a, b, ends),
            2,
        ),
        "whiten": (lambda a, b, c, i: K.whiten(a, mask, impl=i), lambda a, b, c: rivals.whiten(a, mask), 2),
    }
    for op, (fused, eager, reads) in ops.items():
        fast = compiled(eager)
        yield Problem(
            op=op,
            mode="forward",
            dtype=dtype,
            shape=f"{s}x{t}",
            runs={
                **named(names, lambda i, f=fused: lambda: [f(logprobs, ref, scores, i)]),
                "eager": lambda f=eager: [f(logprobs, ref, scores)],
                "compile": lambda f=fast: [f(logprobs, ref, scores)],
            },
            truth=lambda f=eager: [f(logprobs.double(), ref.double(), scores.double())],
            tolerance=tolerance(dtype),
            bytes=n * (reads * logprobs.element_size() + 4),
            missing=missing,
            needs_compile=frozenset({"compile"}),
        )


def sample(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    full = 64, SHAPES[size][1] if size in SHAPES else 32000
    b, v = sized(size, {"full": full, "quick": (4, 500), "tiny": (1, 64)})
    logits = draw(device, dtype, b, v, scale=3.0)
    seeds, positions = torch.arange(b, device=device), torch.zeros(b, dtype=torch.int64, device=device)
    names, missing = ours(device, {})
    cut = dict(temperature=0.9, top_k=50, top_p=0.9)

    def distance(results: Sequence[Tensor]) -> float:
        """Of the token's logprob from that of the distribution to draw from; infinite for a token that was cut."""
        logp = rivals.cut_by_sorting(logits.double(), **cut).log_softmax(-1)
        return float((logp.gather(1, results[0].unsqueeze(1)).squeeze(1) - results[1].double()).abs().max())

    yield Problem(
        op="sample",
        mode="top-k 50, top-p 0.9",
        dtype=dtype,
        shape=f"{b}x{v}",
        runs={
            **named(names, lambda name: lambda: K.sample(logits, seeds, positions, impl=name, **cut)),
            "sort: token and logprob": lambda: rivals.sample_by_sorting(logits.float(), **cut),
            "sort: the same four results": lambda: rivals.sample_by_sorting_in_full(logits.float(), **cut),
        },
        truth=lambda: [],
        tolerance=1e-3,
        bytes=logits.numel() * logits.element_size(),
        missing=missing,
        check=distance,
    )

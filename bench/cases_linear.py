"""The fused linear ops, against bare GEMMs, eager torch, torch.compile, torch's own linear_cross_entropy, and the
published packages of Liger and Apple where they are installed and run on the device. The truth is eager torch in a
higher precision."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ppomax_kernels as K
import torch
from torch import Tensor
from torch.nn import functional as F

from . import rivals
from .cases import draw, grad_of, integers, named, tolerance
from .problem import SHAPES, Problem, Run, compiled, ours, sized

SEQUENCES = 16  # Liger's loss takes one advantage a sequence, so all runs are given such advantages
CLIP, ENT_COEF = 0.2, 0.01


@dataclass
class Head:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    shape: str

    @property
    def flops(self) -> int:
        """Of one GEMM."""
        return 2 * self.weight.shape[0] * self.hidden.numel()

    def exact(self) -> tuple[Tensor, Tensor]:
        """The inputs to compute the truth from: float64 where that takes no minutes."""
        wide = self.flops < 2e9 or (self.hidden.dtype == torch.float32 and self.hidden.is_cuda)
        dtype = torch.float64 if wide else torch.float32
        return self.hidden.detach().to(dtype).requires_grad_(), self.weight.detach().to(dtype).requires_grad_()


def head(device: torch.device, dtype: torch.dtype, size: str) -> Head:
    full = (8192, 151936, 4096) if device.type == "cuda" else (1024, 32000, 512)
    if size in SHAPES:
        d, v = SHAPES[size]
        full = 8192 if device.type == "cuda" else 256, v, d
    n, v, d = sized(size, {"full": full, "quick": (64, 1000, 64), "tiny": (16, 64, 16)})
    hidden = draw(device, dtype, n, d).requires_grad_()
    weight = draw(device, dtype, v, d, scale=2.0 / d**0.5, seed=1).requires_grad_()
    labels = integers(device, v, n)
    with torch.no_grad():
        old = torch.cat(
            [
                rivals.logprobs_entropy(h @ weight.T, y)[0]
                for h, y in zip(hidden.split(256), labels.split(256), strict=True)
            ]
        )
    old = old + draw(device, torch.float32, n, scale=0.1, seed=2)
    advantages = draw(device, torch.float32, SEQUENCES, seed=3).repeat_interleave(n // SEQUENCES)
    return Head(hidden, weight, labels, old, advantages, f"{n}x{d}x{v}")


def gemms(x: Head, forwards: int) -> Run:
    """The GEMMs alone: logits (`forwards` times), dhidden, dweight."""
    h, w = x.hidden.detach(), x.weight.detach()
    z = torch.empty(h.shape[0], w.shape[0], dtype=h.dtype, device=h.device)
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def run() -> Sequence[Tensor]:
        for _ in range(forwards):
            torch.mm(h, w.T, out=z)
        return torch.mm(z, w, out=dh), torch.mm(z.T, h, out=dw)

    return run


def linear_token_logprobs(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    x = head(device, dtype, size)
    up = [draw(device, torch.float32, x.labels.shape[0], seed=seed) for seed in (4, 5)]
    names, missing = ours(device, {})

    def eager(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rivals.logprobs_entropy(h @ w.T, x.labels)

    def own(name: str) -> Run:
        return lambda: K.linear_token_logprobs(x.hidden, x.weight, x.labels, return_entropy=True, impl=name)

    def scored(name: str) -> Run:
        run = own(name)
        return torch.no_grad()(run)

    def invariant(name: str) -> Run:
        return lambda: K.linear_token_logprobs(
            x.hidden, x.weight, x.labels, return_entropy=True, batch_invariant=True, impl=name
        )

    inputs, exact, fast = [x.hidden, x.weight], x.exact(), [compiled(eager), compiled(eager)]
    common: dict[str, Any] = dict(
        op="linear_token_logprobs",
        dtype=dtype,
        shape=x.shape,
        memory=True,
        missing=missing,
        needs_compile=frozenset({"compile"}),
    )
    one = torch.empty(x.labels.shape[0], x.weight.shape[0], dtype=dtype, device=device)
    yield Problem(
        mode="forward",
        runs={
            **named(names, scored),
            "gemms": lambda: [torch.mm(x.hidden.detach(), x.weight.detach().T, out=one)],
            "eager": torch.no_grad()(lambda: eager(x.hidden, x.weight)),
            "compile": torch.no_grad()(lambda: fast[0](x.hidden, x.weight)),
        },
        truth=torch.no_grad()(lambda: eager(*exact)),
        tolerance=tolerance(dtype),
        flops=x.flops,
        unchecked=frozenset({"gemms"}),
        **common,
    )
    yield Problem(
        mode="forward+backward",
        runs={
            **named(names, lambda name: grad_of(own(name), inputs, up)),
            **{
                f"{name}, batch_invariant": run
                for name, run in named(names, lambda name: grad_of(invariant(name), inputs, up)).items()
            },
            "gemms": gemms(x, 2),
            "eager": grad_of(lambda: eager(*inputs), inputs, up),
            "compile": grad_of(lambda: fast[1](*inputs), inputs, up),
        },
        truth=grad_of(lambda: eager(*exact), exact, [u.to(exact[0].dtype) for u in up]),
        tolerance=tolerance(dtype),
        flops=4 * x.flops,
        unchecked=frozenset({"gemms"}),
        **common,
    )


def loss_and_gradients(loss: Callable[[Tensor, Tensor], Tensor], inputs: Sequence[Tensor]) -> Run:
    def run() -> Sequence[Tensor]:
        value = loss(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    return run


def linear_ppo_loss(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    x = head(device, dtype, size)
    names, missing = ours(device, {})
    everyone = torch.ones_like(x.labels, dtype=torch.bool)
    inputs, exact = [x.hidden, x.weight], x.exact()
    for ent_coef, mode in ((ENT_COEF, "forward+backward"), (0.0, "forward+backward, no entropy bonus")):

        def eager(h: Tensor, w: Tensor, ent_coef: float = ent_coef) -> Tensor:
            logprobs, entropy = rivals.logprobs_entropy(h @ w.T, x.labels)
            loss = rivals.policy_loss(
                logprobs, x.old_logprobs.to(logprobs.dtype), x.advantages.to(logprobs.dtype), everyone
            )
            return loss - ent_coef * entropy.mean() if ent_coef else loss

        def own(name: str, ent_coef: float = ent_coef) -> Run:
            def loss(h: Tensor, w: Tensor) -> Tensor:
                return K.linear_ppo_loss(h, w, x.labels, x.old_logprobs, x.advantages, ent_coef=ent_coef, impl=name)[0]

            return loss_and_gradients(loss, inputs)

        fast = compiled(eager)
        runs = {
            **named(names, own),
            "gemms": gemms(x, 1),
            "eager": loss_and_gradients(eager, inputs),
            "compile": loss_and_gradients(fast, inputs),
        }
        lost = dict(missing)
        if not ent_coef:
            try:
                runs["liger"] = liger_ppo(x)
            except ImportError as error:
                lost["liger"] = str(error)
        yield Problem(
            op="linear_ppo_loss",
            mode=mode,
            dtype=dtype,
            shape=x.shape,
            runs=runs,
            truth=loss_and_gradients(eager, exact),
            tolerance=tolerance(dtype),
            flops=3 * x.flops,
            memory=True,
            missing=lost,
            unchecked=frozenset({"gemms"}),
            needs_compile=frozenset({"compile"}),
        )


def liger_ppo(x: Head) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=CLIP, epsilon_high=CLIP
    )
    n = x.labels.shape[0]

    def by_sequence(t: Tensor) -> Tensor:
        return t.view(SEQUENCES, n // SEQUENCES, *t.shape[1:])

    mask = by_sequence(torch.ones_like(x.labels))
    advantages = by_sequence(x.advantages)[:, 0].contiguous()

    def run(h: Tensor, w: Tensor) -> Tensor:
        old = by_sequence(x.old_logprobs)
        value: Tensor = loss(by_sequence(h), w, by_sequence(x.labels), mask, advantages, old_per_token_logps=old)[0]
        return value

    return loss_and_gradients(run, [x.hidden, x.weight])


def linear_nll(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    x = head(device, dtype, size)
    names, missing = ours(device, {})
    inputs = [x.hidden, x.weight]

    def eager(h: Tensor, w: Tensor) -> Tensor:
        logits = h @ w.T
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), x.labels)

    def own(name: str) -> Run:
        return loss_and_gradients(lambda h, w: K.linear_nll(h, w, x.labels, impl=name)[0], inputs)

    fast = compiled(eager)
    runs = {
        **named(names, own),
        "gemms": gemms(x, 1),
        "eager": loss_and_gradients(eager, inputs),
        "compile": loss_and_gradients(fast, inputs),
    }
    for name, make in {
        "torch linear_cross_entropy": torch_own,
        "liger": liger_nll,
        "cut-cross-entropy": apple_nll,
    }.items():
        try:
            runs[name] = loss_and_gradients(make(x), inputs)
        except (ImportError, RuntimeError) as error:
            missing = {**missing, name: str(error)}
    yield Problem(
        op="linear_nll",
        mode="forward+backward",
        dtype=dtype,
        shape=x.shape,
        runs=runs,
        truth=loss_and_gradients(eager, x.exact()),
        tolerance=tolerance(dtype),
        flops=3 * x.flops,
        memory=True,
        missing=missing,
        unchecked=frozenset({"gemms"}),
        needs_compile=frozenset({"compile"}),
    )


def torch_own(x: Head) -> Callable[[Tensor, Tensor], Tensor]:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w: F.linear_cross_entropy(h, w, x.labels, options=options)


def liger_nll(x: Head) -> Callable[[Tensor, Tensor], Tensor]:
    if not x.hidden.is_cuda:
        raise RuntimeError("its Triton kernel needs a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda h, w: loss(w, h, x.labels)


def apple_nll(x: Head) -> Callable[[Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    impl = "cce" if x.hidden.is_cuda else "torch_compile"
    return lambda h, w: linear_cross_entropy(h, w, x.labels, impl=impl)

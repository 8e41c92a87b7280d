"""Bad input: an error that names op and argument, what was wanted, what came and the mend. TypeError for dtypes,
ValueError for the rest; never a crash, never a silent copy. The same on every back-end, since the public function
checks; what only a kernel can see (labels, cu_seqlens) on CPUs."""

import re
from collections.abc import Callable
from typing import Any

import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels.registry import OPS, table_of
from torch import Tensor

from .backends import Backend
from .calls import DIFFERENTIABLE, WANTS, arguments
from .verify import leaf

Change = Callable[[Any], Any]
INT = torch.int32
NAN, INF = float("nan"), float("inf")


def wrong(op: str, name: str, to: Any, *said: str, error: type[Exception] = ValueError, **more: Any) -> Any:
    return pytest.param(op, name, to, said, error, more, id=f"{op}-{name}-{'-'.join(said)[:40]}".replace(" ", "_"))


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[-1:]])


def strided(x: Tensor) -> Tensor:
    """The same values with a stride of 2 in the last dimension."""
    return torch.stack([x, x], -1)[..., 0]


def tensors(op: str) -> list[str]:
    return [k for k, v in arguments()[op].items() if isinstance(v, Tensor)]


def others(op: str) -> list[str]:
    """All tensors but the one whose device the others must share."""
    first = "logprobs" if op == "token_rewards" else tensors(op)[0]
    return [n for n in tensors(op) if n != first]


def floats(op: str) -> list[str]:
    return [k for k, v in arguments()[op].items() if isinstance(v, Tensor) and v.is_floating_point()]


COMMON = [
    *(
        wrong(op, n, lambda x: x.tolist(), "must be a torch.Tensor, got list", "torch.as_tensor", error=TypeError)
        for op in OPS
        for n in tensors(op)
    ),
    *(
        wrong(op, n, lambda x: x.long(), "must be float32, bfloat16 or float16, got int64", error=TypeError)
        for op in OPS
        for n in floats(op)
    ),
    *(
        wrong(op, n, lambda x: x.double(), "got float64", f"{n}.float()", error=TypeError)
        for op in OPS
        for n in floats(op)
    ),
    *(
        wrong(op, n, lambda x: x.to("meta"), "must be on ", "got meta", "move it with")
        for op in OPS
        for n in others(op)
    ),
    *(wrong(op, "impl", "gpu", "must be 'auto' or one of", "got 'gpu'") for op in OPS),
]
# An op, an argument, what becomes of it, what the message must say.
SHAPES = [
    wrong("token_logprobs", "labels", longer, "must have shape (12,) like", "got (13,)"),
    wrong("token_logprobs", "logits", lambda x: x[0, 0], "must have shape (..., V)", "got ()"),
    wrong("token_logprobs", "logits", lambda x: x[:, :0], "V >= 1"),
    wrong("token_logprobs", "logits", strided, "last dimension", "contiguous()"),
    wrong("token_logprobs", "labels", lambda x: x.int(), "must be int64, got int32", error=TypeError),
    wrong("kl_penalty", "ref_logprobs", longer, "must have shape (12,) like logprobs, got (13,)"),
    wrong(
        "kl_penalty",
        "ref_logprobs",
        strided,
        "must be contiguous, got shape (12,) with strides (2,)",
        "ref_logprobs.contiguous()",
    ),
    wrong("token_rewards", "logprobs", lambda x: x.view(2, 6), "of shape (N,), got (2, 6)"),
    wrong("token_rewards", "ref_logprobs", longer, "got (13,)"),
    wrong("token_rewards", "scores", longer, "must have shape (S,) = (2,)", "got (3,)"),
    wrong("token_rewards", "cu_seqlens", lambda x: x.long(), "must be int32, got int64", error=TypeError),
    wrong("token_rewards", "cu_seqlens", lambda x: x.view(1, 3), "must have shape (S+1,), got (1, 3)"),
    wrong(
        "gae",
        "values",
        longer,
        "must have shape (12,) like rewards, got (13,)",
        "drop the bootstrap column and pass it as bootstrap=",
    ),
    wrong("gae", "mask", lambda x: x[:-1], "must have shape (12,) like rewards, got (11,)"),
    wrong("gae", "mask", lambda x: x.float(), "must be bool or uint8, got float32", "mask.bool()", error=TypeError),
    wrong("gae", "bootstrap", lambda x: x[:1], "must have shape (S,) = (2,), one per sequence, got (1,)"),
    wrong("gae", "lam", lambda x: torch.full((3,), 0.9), "lam must have shape (S,) = (2,)", "got (3,)"),
    wrong("gae", "cu_seqlens", lambda x: None, "must have shape (B, T), got (12,)", "pass cu_seqlens"),
    wrong("gae", "rewards", lambda x: x.view(2, 6), "of shape (N,), got (2, 6)"),
    wrong("gae", "values", strided, "last dimension of values must be contiguous"),
    wrong("whiten", "mask", longer, "must have shape (12,) like x, got (13,)"),
    wrong("whiten", "mask", lambda x: x.int(), "must be bool or uint8, got int32", error=TypeError),
    wrong("whiten", "x", strided, "must be contiguous"),
    *(wrong("ppo_loss", n, longer, "must have shape (12,) like logprobs, got (13,)") for n in tensors("ppo_loss")[1:]),
    *(wrong("ppo_loss", n, strided, "must be contiguous", f"{n}.contiguous()") for n in tensors("ppo_loss")),
    wrong("ppo_loss", "mask", lambda x: x.float(), "must be bool or uint8", error=TypeError),
    *(
        wrong("value_loss", n, longer, "must have shape (12,) like values, got (13,)")
        for n in tensors("value_loss")[1:]
    ),
    *(wrong("value_loss", n, strided, "must be contiguous") for n in tensors("value_loss")),
    *(
        entry
        for op in ("linear_token_logprobs", "linear_ppo_loss", "linear_nll")
        for entry in (
            wrong(
                op,
                "weight",
                lambda x: x[:, :-1].contiguous(),
                "must have shape (V, D) with D = 16 like hidden, got (67, 15)",
            ),
            wrong(
                op, "hidden", lambda x: x.view(3, 4, 16), "must have shape (N, D)", "got (3, 4, 16)", "hidden.flatten"
            ),
            wrong(
                op,
                "hidden",
                lambda x: x.bfloat16(),
                "must be torch.bfloat16 like hidden, got torch.float32",
                "cast",
                error=TypeError,
            ),
            wrong(op, "bias", longer, "bias must have shape (67,)", "got (68,)"),
            wrong(op, "labels", longer, "got (13,)"),
            wrong(op, "labels", lambda x: x.int(), "must be int64, got int32", error=TypeError),
            wrong(op, "chunk_tokens", 0, "must be >= 1, got 0"),
            wrong(op, "kept", 13, "must be in [0, N] = [0, 12], got 13"),
            wrong(op, "temperature", NAN, "temperature must be", "got nan"),
            wrong(op, "softcap", -1.0, "softcap must be", "got -1.0"),
        )
    ),
    wrong("linear_ppo_loss", "advantages", longer, "got (13,)"),
    wrong("sample", "logits", lambda x: x[0], "must have shape (B, V)", "got (67,)"),
    wrong("sample", "logits", strided, "last dimension of logits must be contiguous"),
    wrong("sample", "seeds", longer, "got (5,)"),
    wrong("sample", "positions", lambda x: x.int(), "must be int64, got int32", error=TypeError),
]
RANGES = [
    *(
        wrong("token_logprobs", "temperature", t, "temperature must be finite and > 0", f"got {t}")
        for t in (0.0, -1.0, NAN, INF)
    ),
    *(wrong("token_logprobs", "softcap", t, "softcap must be", f"got {t}") for t in (0.0, -3.0, NAN, INF)),
    *(
        wrong(op, "estimator", "k4", "estimator must be one of 'k1', 'k2', 'k3', 'abs', got 'k4'")
        for op in ("kl_penalty", "token_rewards", "ppo_loss")
    ),
    *(wrong("token_rewards", "kl_coef", c, "kl_coef must be", f"got {c}") for c in (-0.1, NAN, INF)),
    *(wrong("gae", n, c, f"{n} must be in [0, 1], got {c}") for n in ("gamma", "lam") for c in (-0.1, 1.01, NAN, INF)),
    *(wrong("whiten", "eps", c, "eps must be", f"got {c}") for c in (0.0, -1e-8, NAN, INF)),
    *(
        wrong(op, "clip_low", c, "clip_low must be in [0, 1]", f"got {c}")
        for op in ("ppo_loss", "linear_ppo_loss")
        for c in (-0.1, 1.01, NAN)
    ),
    *(
        wrong(op, "clip_high", c, "clip_high must be", f"got {c}")
        for op in ("ppo_loss", "linear_ppo_loss")
        for c in (-0.1, NAN, -INF)
    ),
    *(
        wrong(op, "dual_clip", c, "dual_clip must be", f"got {c}")
        for op in ("ppo_loss", "linear_ppo_loss")
        for c in (1.0, 0.0, NAN, INF)
    ),
    *(wrong("ppo_loss", "kl_coef", c, "kl_coef must be", f"got {c}") for c in (-0.1, NAN)),
    *(wrong("ppo_loss", "ent_coef", c, "ent_coef must be finite", f"got {c}") for c in (NAN, INF)),
    wrong("ppo_loss", "ref_logprobs", None, "kl_coef = 0.1 needs ref_logprobs, got None"),
    wrong("ppo_loss", "entropy", None, "ent_coef = 0.01 needs entropy, got None"),
    *(wrong("value_loss", "clip", c, "clip must be", f"got {c}") for c in (-0.1, NAN, INF)),
    *(
        wrong(op, "normalizer", c, "normalizer must be", said)
        for op in ("ppo_loss", "value_loss", "linear_ppo_loss", "linear_nll")
        for c, said in (
            (0.0, "got 0.0"),
            (-3.0, "got -3.0"),
            (NAN, "got nan"),
            (torch.ones(2), "got shape (2,)"),
            (torch.tensor(3), "torch.int64"),
        )
    ),
    *(wrong("sample", "temperature", c, "temperature must be", f"got {c}") for c in (-1.0, NAN, INF)),
    wrong("sample", "top_k", -1, "top_k must be >= 0", "got -1"),
    *(wrong("sample", "top_p", c, "top_p must be in (0, 1]", f"got {c}") for c in (0.0, 1.1, NAN)),
]


def refused(op: str, impl: str, name: str, to: Any, said: tuple[str, ...], error: type[Exception], device: str) -> None:
    given = arguments(device)[op]
    given["impl"] = impl
    given[name] = to(given.get(name)) if callable(to) else to.to(device) if isinstance(to, Tensor) else to
    with pytest.raises(error) as caught:
        getattr(K, op)(**given)
    message = str(caught.value)
    assert message.startswith(f"{op}: "), message
    for part in said:
        assert part in message, f"{message!r} does not say {part!r}"
    assert name in message or name == "hidden", f"{message!r} does not name {name}"


@pytest.mark.parametrize(("op", "name", "to", "said", "error", "more"), [*COMMON, *SHAPES, *RANGES])
def test_refused(
    op: str, name: str, to: Any, said: tuple[str, ...], error: type[Exception], more: dict[str, Any]
) -> None:
    refused(op, "auto", name, to, said, error, "cpu")


LABELS = ("token_logprobs", "linear_token_logprobs", "linear_ppo_loss", "linear_nll")


@pytest.mark.parametrize("op", LABELS)
@pytest.mark.parametrize("label", [67, -1, -101, 2**40, 1 - 2**63])
def test_label_outside(impl: Backend, op: str, label: int) -> None:
    """On a CPU an error; where reading labels back would stall (GPU, and Triton's code for it) NaN, and nothing
    outside the logits is touched."""
    given = arguments(impl.device)[op]
    given["labels"][5] = label
    if impl.name in ("triton", "cuda") and op == "token_logprobs":
        given["logits"].requires_grad_()
        logprobs, _ = K.token_logprobs(**given, impl=impl.name)
        assert torch.isnan(logprobs).nonzero().tolist() == [[5]]
        (d,) = torch.autograd.grad(logprobs.sum(), given["logits"])
        assert torch.isnan(d).any(-1).nonzero().tolist() == [[5]]
        return
    if impl.device == "cuda":
        pytest.skip(f"{impl.name}: NaN on a GPU, tried above")
    with pytest.raises(
        ValueError,
        match=rf"^{op}: labels must lie in \[0, V\) = \[0, 67\) or be ignore_index = -100, got {label} at \[5\]",
    ):
        getattr(K, op)(**given, impl=impl.name)


SEQLENS = [
    ([0, 4, 11], "must run from 0 to N = 12, got 0 to 11"),
    ([1, 4, 12], "must run from 0 to N = 12, got 1 to 12"),
    ([0, 4, 2**30], "must run from 0 to N = 12"),
    ([0, 0, 12], "must increase strictly, got 0 then 0 at sequence 0"),
    ([0, 12, 12], "must increase strictly, got 12 then 12 at sequence 1"),
    ([0, 14, 12], "must increase strictly, got 14 then 12 at sequence 1"),
    ([0, -5, 12], "must increase strictly, got 0 then -5 at sequence 0"),
]


@pytest.mark.parametrize("op", ["gae", "token_rewards"])
@pytest.mark.parametrize(("ends", "said"), SEQLENS, ids=lambda x: str(x))
def test_cu_seqlens_values(impl: Backend, op: str, ends: list[int], said: str) -> None:
    given = {**arguments(impl.device)[op], "cu_seqlens": torch.tensor(ends, dtype=INT, device=impl.device)}
    if impl.name in ("triton", "cuda"):  # not read back: whatever comes out, nothing outside the tensors is touched
        for x in getattr(K, op)(**given, impl=impl.name):
            assert x.numel() in (1, 12)
        return
    with pytest.raises(ValueError, match=re.escape(f"{op}: cu_seqlens {said}")):
        getattr(K, op)(**given, impl=impl.name)


@pytest.mark.parametrize("value", [-0.1, 1.5, NAN])
def test_lam_tensor_values(impl: Backend, value: float) -> None:
    given = {**arguments(impl.device)["gae"], "lam": torch.tensor([0.5, value], device=impl.device)}
    if impl.device == "cuda":
        pytest.skip(f"{impl.name}: not read back from a GPU")
    with pytest.raises(ValueError, match=r"^gae: lam must be in \[0, 1\], got (-0\.1|1\.5|nan).* at 1"):
        K.gae(**given, impl=impl.name)


def test_rows_that_two_strides_cannot_walk(impl: Backend) -> None:
    """No silent copy: an error that says what to do. The reference, which is plain torch, takes them."""
    logits = torch.randn(3, 4, 5, 7, device=impl.device).permute(1, 0, 2, 3)
    labels = torch.zeros(4, 3, 5, dtype=torch.int64, device=impl.device)
    if impl.name == "ref":
        K.token_logprobs(logits, labels, impl="ref")
        return
    with pytest.raises(
        ValueError,
        match=r"^token_logprobs: logits of shape .* cannot be walked as two dimensions; .*logits\.contiguous\(\)",
    ):
        K.token_logprobs(logits, labels, impl=impl.name)


NO_GRADIENT = [(op, n) for op in OPS for n in floats(op) if n not in WANTS.get(op, ())]


@pytest.mark.parametrize(("op", "name"), NO_GRADIENT)
def test_gradient_through_what_has_none(op: str, name: str) -> None:
    """Asked for, it is not lost in silence."""
    given = arguments()[op]
    given[name] = leaf(given[name])
    with pytest.raises(
        ValueError, match=rf"^{op}: no gradient flows through {name}, but it requires one; pass {name}\.detach\(\)"
    ):
        getattr(K, op)(**given)
    with torch.no_grad():
        getattr(K, op)(**given)


@pytest.mark.parametrize("op", OPS)
def test_back_end_for_another_device(op: str) -> None:
    """impl="auto" never falls back to the reference; a back-end that is not for these tensors says so."""
    if "cuda" in table_of(op):
        with pytest.raises(ValueError, match=rf"^{op}: impl='cuda' runs on CUDA tensors, got tensors on cpu"):
            getattr(K, op)(**arguments()[op], impl="cuda")
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments()[op].items()}
    with pytest.raises(ValueError, match=rf"^{op}: no back-end for device meta"):
        getattr(K, op)(**meta)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone(impl: Backend, op: str) -> None:
    if impl.name not in table_of(op):
        pytest.skip(f"{impl.name}: {op} has no such back-end")
    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments(impl.device)[op].items()}
    if op in DIFFERENTIABLE:
        wanted = [given[n].requires_grad_() for n in WANTS[op]]
        out = getattr(K, op)(**given, impl=impl.name)
        torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), wanted, allow_unused=True)
    else:
        getattr(K, op)(**given, impl=impl.name)
    for name, before in arguments(impl.device)[op].items():
        if isinstance(before, Tensor):
            assert torch.equal(given[name].detach(), before), f"{op}: {name} was changed"

"""Generalised advantage estimation over packed or padded responses, walked from each sequence's end.
delta_t = r_t + gamma*V_{t+1} - V_t ;  A_t = delta_t + gamma*lam*A_{t+1} ;  R_t = A_t + V_t ;  after the end V is
bootstrap (or 0) and A is 0.
A masked step is stepped over: it carries A_{t+1} and V_{t+1} to the step before it, and its own outputs are 0 (its
inputs are never read into a result, so NaN there is harmless). Reads r and V once, writes A and R once: 16 B a token
in fp32, so memory-bound. No whitening here."""

from torch import Tensor, float32

from . import checks, raw
from .backends import native, reference
from .dispatch import Table, late, pick
from .library import primitive

FORWARD: Table = {
    "cpu": native.gae_cpu,
    "triton": late("gae_triton", "gae_triton"),
    "cuda": late("backends.native_cuda", "gae_cuda"),
    "ref": reference.gae,
}


def _forward(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    lams: Tensor | None,
    bootstrap: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    raw.place("gae", impl, rewards, values, cu_seqlens, mask, lams, bootstrap)
    padded = cu_seqlens is None
    if rewards.ndim != 1 + padded or any(x is not None and x.shape != rewards.shape for x in (values, mask)):
        raise ValueError(
            "gae: rewards, values and mask must be of one shape, (B, T) without cu_seqlens, (N,) with, got "
            f"{tuple(rewards.shape)} and {tuple(values.shape)}"
        )
    if rewards.shape[-1] > 1 and any(x is not None and x.stride(-1) != 1 for x in (rewards, values, mask)):
        raise ValueError("gae: the last dimension of rewards, values and mask must be contiguous")
    raw.mask("gae", mask)
    raw.each("gae", len(rewards) if cu_seqlens is None else raw.sequences("gae", cu_seqlens), lams, bootstrap)
    if lams is not None:
        checks.fractions("gae", "lam", lams)
    return FORWARD[impl](rewards, values, cu_seqlens, mask, gamma, lam, lams, bootstrap)  # type: ignore[no-any-return]


def _shapes(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    lams: Tensor | None,
    bootstrap: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape, dtype=float32), rewards.new_empty(rewards.shape, dtype=float32)


gae_op = primitive("gae", _forward, _shapes, "(Tensor, Tensor)")


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`A_t = sum_l (gamma*lam)**l * (r_{t+l} + gamma*V_{t+l+1} - V_{t+l})`, `returns = A + values`.

    Packed: rewards, values (N,) with cu_seqlens (S+1,) int32, from 0 to N, strictly increasing. Padded: rewards,
    values (B, T), where S = B; rows may be strided (a slice such as `values[:, :-1]` needs no copy). All float32,
    bfloat16 or float16.
    mask: bool or uint8 of the same shape, True on tokens that count. Masked steps carry the running advantage and
    value over; their outputs are 0.
    gamma, lam: in [0, 1]; lam may be a tensor (S,), one per sequence. For different lambdas for actor and critic,
    call twice.
    bootstrap: (S,), the value after the last step of a truncated sequence; 0 where it ended by itself.
    Returns advantages and returns, float32, of the shape of rewards. Not differentiable: an input that requires a
    gradient is refused while gradients are on.
    Raises TypeError for dtypes, ValueError for the rest; on a GPU the values of cu_seqlens and lam (S,) are not read
    back, and wrong ones never read or write outside the tensors.
    Source: arXiv 1506.02438, equations 11-16; carry-over as in verl.
    """
    op = "gae"
    lams = lam if isinstance(lam, Tensor) else None
    checks.tensor(op, rewards=rewards, values=values, cu_seqlens=cu_seqlens, mask=mask, bootstrap=bootstrap)
    checks.same_device(
        op, "rewards", rewards, values=values, cu_seqlens=cu_seqlens, mask=mask, lam=lams, bootstrap=bootstrap
    )
    checks.floating(op, impl, rewards=rewards, values=values, lam=lams, bootstrap=bootstrap)
    checks.mask_dtype(op, mask)
    sequences = _sequences(rewards, cu_seqlens)
    if values.shape != rewards.shape:
        raise ValueError(
            f"gae: values must have shape {tuple(rewards.shape)} like rewards, got {tuple(values.shape)}; "
            "drop the bootstrap column and pass it as bootstrap="
        )
    checks.same_shape(op, "rewards", rewards.shape, mask=mask)
    for name, x in (("lam", lams), ("bootstrap", bootstrap)):
        if x is not None and tuple(x.shape) != (sequences,):
            raise ValueError(
                f"{op}: {name} must have shape (S,) = ({sequences},), one per sequence, got {tuple(x.shape)}"
            )
    for name, x in (("rewards", rewards), ("values", values), ("mask", mask)):
        if x is not None and x.ndim:
            checks.unit_stride(op, name, x)
    checks.contiguous(op, lam=lams, bootstrap=bootstrap)
    checks.number(op, "gamma", gamma, 0.0, 1.0)
    if not isinstance(lam, Tensor):
        checks.number(op, "lam", lam, 0.0, 1.0)
    checks.no_gradient(op, rewards=rewards, values=values, lam=lams, bootstrap=bootstrap)
    choice = pick(op, impl, rewards.device, FORWARD)
    scalar = 0.0 if isinstance(lam, Tensor) else float(lam)
    if choice == "ref":
        return _forward(rewards, values, cu_seqlens, mask, gamma, scalar, lams, bootstrap, choice)
    return gae_op(rewards, values, cu_seqlens, mask, gamma, scalar, lams, bootstrap, choice)  # type: ignore[no-any-return]


def _sequences(rewards: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        if rewards.ndim != 2:
            raise ValueError(
                f"gae: without cu_seqlens rewards must have shape (B, T), got {tuple(rewards.shape)}; pass cu_seqlens "
                "for packed tokens"
            )
        return rewards.shape[0]
    if rewards.ndim != 1:
        raise ValueError(
            f"gae: with cu_seqlens rewards must be packed, of shape (N,), got {tuple(rewards.shape)}; drop cu_seqlens "
            "for padded ones"
        )
    return checks.cu_seqlens("gae", cu_seqlens)

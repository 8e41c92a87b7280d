"""Every registered op called past its public door, with every argument wrong in turn.

    python -m tests.kernels.raw_sweep [IMPL]     prints how many calls were made; a crash is the failure
A call may return anything, or raise; it must not read or write outside its tensors. `python -m tests.kernels.sanitized`
runs it under the address sanitizer, which sees what a crash alone would not tell."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from ppomax_kernels.registry import OPS
from torch import Tensor

from .sanitized import use_built

N, V = (16, 16) if "triton" in sys.argv else (600, 64)  # Triton's interpreter is slow
D, S = 8, 2
"""Enough tokens that a step too far leaves the allocation."""
CU = [0, N // 3, N]


def tensors() -> dict[str, Tensor]:
    """A good value of each tensor argument by its name in the schemas, made anew."""
    g = torch.Generator().manual_seed(0)
    one_a_token = (
        "rewards values old_values returns logprobs ref_logprobs old_logprobs advantages is_weights entropy lse "
        "dlogprobs dentropy dkl x"
    )
    return {
        **{name: torch.rand(N, generator=g) for name in one_a_token.split()},
        "logits": torch.rand(N, V, generator=g),
        "hidden": torch.rand(N, D, generator=g),
        "weight": torch.rand(V, D, generator=g),
        "bias": torch.rand(V, generator=g),
        "labels": torch.randint(V, (N,), generator=g),
        "mask": torch.ones(N, dtype=torch.bool),
        "cu_seqlens": torch.tensor(CU, dtype=torch.int32),
        "lams": torch.rand(S, generator=g),
        "bootstrap": torch.rand(S, generator=g),
        "scores": torch.rand(S, generator=g),
        "normalizer": torch.tensor(3.0),
        "moments": torch.tensor([float(N), 0.0, 1.0], dtype=torch.float64),
        "seeds": torch.arange(N),
        "positions": torch.arange(N),
    }


NUMBERS: dict[str, Any] = {
    "gamma": 1.0, "lam": 0.95, "temperature": 1.0, "softcap": 0.0, "ignore_index": -100, "kept": -1, "chunk": 0,
    "invariant": False, "entropy": True, "norm_value": 0.0, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0,
    "kl_coef": 0.1, "ent_coef": 0.1, "clip": 0.2, "need_grad": True, "need_hidden": True, "need_weight": True,
    "need_bias": True, "shift_mean": True, "eps": 1e-8, "top_k": 0, "top_p": 1.0, "estimator": "k3", "impl": "cpu",
}  # fmt: skip


def wrong(x: Tensor) -> Iterator[Tensor]:
    """What could come in the place of `x`."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.complex64):
        if dtype != x.dtype:
            yield x.to(dtype)
    yield x[None]
    yield x.flatten()
    yield x.new_zeros(())
    yield x.new_zeros(0)
    yield x.expand(3, *x.shape)
    yield x.to("meta")
    if x.ndim:
        yield from (x[:0], x[: len(x) // 2], torch.cat([x, x]), x[..., ::2], x.mT if x.ndim > 1 else x[:, None].mT)
        yield x.repeat_interleave(2, 0)[::2]
        yield x[:1].expand(x.shape)
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    yield freed
    if not x.is_floating_point() and x.dtype != torch.bool:
        yield from (x - 1, x + 1, x.flip(0), torch.full_like(x, 2**31 - 1), torch.full_like(x, -(2**31)))
        yield torch.full_like(x, -(2**63) if x.dtype == torch.int64 else -1)
    else:
        yield torch.full_like(x, torch.nan) if x.is_floating_point() else ~x


def wrong_number(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return ["", "none", "ref", "triton", "cuda", "k9"]
    if isinstance(value, int):
        return [-1, 0, 1, 2, N, N + 1, 2**31, 2**62, -(2**63)]
    return [-1.0, 0.0, 1e-300, 1e30, float("inf"), float("nan")]


def sweep(name: str) -> int:
    """All calls of one op; returns their number."""
    op = getattr(torch.ops.ppomax, name).default
    calls = 0

    def attempt(replaced: str | None, value: Any, left_out: bool = False) -> None:
        nonlocal calls
        good = tensors()
        arguments = []
        for argument in op._schema.arguments:
            tensor = "Tensor" in str(argument.type)
            one = good[argument.name] if tensor else NUMBERS[argument.name]
            optional = "Optional" in str(argument.type)
            one = None if left_out and optional else one
            arguments.append(value if argument.name == replaced else one)
        calls += 1
        with contextlib.suppress(Exception):  # an error is as good as a result: memory is what is looked at
            op(*arguments)

    for left_out in (False, True):
        attempt(None, None, left_out)
        for argument in op._schema.arguments:
            if "Tensor" in str(argument.type):
                for value in wrong(tensors()[argument.name]):
                    attempt(argument.name, value, left_out)
                if "Optional" in str(argument.type):
                    attempt(argument.name, None, left_out)
            else:
                for value in wrong_number(NUMBERS[argument.name]):
                    attempt(argument.name, value, left_out)
    return calls


def names() -> list[str]:
    """Every op that torch knows under our name."""
    for op in OPS:
        import_module(f"ppomax_kernels.{op}")
    every = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("ppomax::") for name in every if name.startswith("ppomax::"))


def main() -> None:
    warnings.simplefilter("ignore")
    use_built()
    torch.set_num_threads(1)
    NUMBERS["impl"] = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if NUMBERS["impl"] == "cpu":  # else each wrong `impl` would go through the interpreter, which is slow
        os.environ["TRITON_INTERPRET"] = "0"
    for name in names():
        print(f"{name}: {sweep(name)} calls", flush=True)


if __name__ == "__main__":
    main()

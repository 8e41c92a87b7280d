"""Prints, as JSON, how many variants Triton would compile of each kernel when only a length, or only a number such as
the temperature, varies. Run by test_launches.py in a process of its own, where Triton is not told to interpret:
launchers run on meta tensors and hand their launches over."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ppomax_kernels.compile_triton import _as_compiled
from ppomax_kernels.gae_triton import gae_triton
from ppomax_kernels.kl_penalty_triton import kl_penalty_backward_triton, kl_penalty_triton
from ppomax_kernels.launch_triton import recorded
from ppomax_kernels.ppo_loss_triton import ppo_loss_triton
from ppomax_kernels.sample_triton import sample_triton
from ppomax_kernels.token_logprobs_triton import token_logprobs_backward_triton, token_logprobs_triton
from ppomax_kernels.token_rewards_triton import token_rewards_triton
from ppomax_kernels.value_loss_triton import value_loss_triton
from ppomax_kernels.whiten_triton import moments_triton, whiten_triton

LENGTHS = (2, 3, 16, 33, 64, 100, 255, 256, 257, 1000, 1024, 4095, 4096, 5001, 65541)
NUMBERS = (0.25, 0.5, 0.7, 0.9, 0.99, 1.0)


def f32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def i64(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def calls(n: int, x: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every launcher, with n tokens (for V = 50257 words) and x for each of its numbers."""
    z, y, row, mask = f32(n, 50257), i64(n), f32(n), torch.empty(n, dtype=torch.bool, device="meta")
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    yield "token_logprobs", lambda: token_logprobs_triton(z, y, x, 0.0, True, -100)
    yield "token_logprobs bwd", lambda: token_logprobs_backward_triton(row, row, z, y, row, row, x, 0.0, -100)
    yield "softcap", lambda: token_logprobs_triton(z, y, 1.0, 30.0 * x, True, -100)
    yield "kl_penalty", lambda: kl_penalty_triton(row, row, "k3")
    yield "kl_penalty bwd", lambda: kl_penalty_backward_triton(row, row, row, "k3")
    yield "token_rewards", lambda: token_rewards_triton(f32(2), row, row, ends, x, "k1")
    yield "gae packed", lambda: gae_triton(row, row, ends, mask, x, x, None, None)
    yield "gae padded", lambda: gae_triton(f32(4, n), f32(4, n), None, None, x, x, None, None)
    yield "moments", lambda: moments_triton(row, mask)
    yield "whiten", lambda: whiten_triton(row, mask, torch.empty(3, dtype=torch.float64, device="meta"), True, 1e-8 * x)
    policy = (row, row, row, mask, None, row, row, None)
    yield "ppo_loss", lambda: ppo_loss_triton(*policy, 10.0 * x, 0.5 * x, x, 2.0 + x, x, "k3", x, True)
    yield "value_loss", lambda: value_loss_triton(row, row, row, mask, None, 10.0 * x, x, True)
    yield "sample", lambda: sample_triton(z, y, y, x, 0, 0.5 + x / 4)
    yield "sample top_k", lambda: sample_triton(z, y, y, 1.0, int(100 * x), 1.0)


def variants(settings: list[tuple[int, float]]) -> dict[str, int]:
    """Call -> the most variants of one of its kernels."""
    keys: dict[str, dict[str, set[str]]] = {}
    for n, x in settings:
        for name, call in calls(n, x):

            def record(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], name: str = name) -> None:
                launch = _as_compiled(kernel, args, constants, name)
                keys.setdefault(name, {}).setdefault(kernel.__name__, set()).add(launch.key)

            with recorded(record):
                call()
    return {name: max(map(len, kernels.values())) for name, kernels in keys.items()}


if __name__ == "__main__":
    print(
        json.dumps(
            {"lengths": variants([(n, 0.9) for n in LENGTHS]), "numbers": variants([(1000, x) for x in NUMBERS])}
        )
    )

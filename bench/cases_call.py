"""What a call costs beyond the work: the public op on the smallest shape against the bare native function with its
arguments ready."""

from collections.abc import Iterator, Sequence
from typing import Any

import ppomax_kernels as K
import torch
from ppomax_kernels.backends import abi
from torch import Tensor

from .cases import grad_of
from .problem import Problem

BARE = "bare native function"


def calls(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Problem]:
    if device.type == "cpu" and dtype == torch.float32:
        yield from _token_logprobs()
        yield from _gae()


def _token_logprobs() -> Iterator[Problem]:
    logits, labels, up = torch.randn(1, 8), torch.tensor([3]), torch.ones(1)
    leaf = logits.detach().requires_grad_()
    logprobs, lse, dlogits = torch.empty(1), torch.empty(1), torch.empty(1, 8)
    lib = abi.library()
    rows = logits.data_ptr(), 0, 1, 1, 8, 8, 8, labels.data_ptr(), 1, 1
    forward_args = *rows, 1.0, 0.0, -100, logprobs.data_ptr(), None, lse.data_ptr(), 1
    backward_args = up.data_ptr(), 1, 1, None, 0, 0, *rows, lse.data_ptr(), None, 1.0, 0.0, -100, dlogits.data_ptr(), 1

    def bare() -> Sequence[Tensor]:
        lib.ppomax_token_logprobs_cpu(*forward_args)
        return [logprobs]

    def bare_both() -> Sequence[Tensor]:
        lib.ppomax_token_logprobs_cpu(*forward_args)
        lib.ppomax_token_logprobs_backward_cpu(*backward_args)
        return [dlogits]

    def public(x: Tensor) -> list[Tensor]:
        y = K.token_logprobs(x, labels)
        assert isinstance(y, Tensor)
        return [y]

    def reference(x: Tensor) -> list[Tensor]:
        y = K.token_logprobs(x, labels, impl="ref")
        assert isinstance(y, Tensor)
        return [y]

    common: dict[str, Any] = dict(op="token_logprobs", dtype=torch.float32, shape="1x8", tolerance=1e-5)
    yield Problem(
        mode="call", runs={"ppomax cpu": lambda: public(logits), BARE: bare}, truth=lambda: reference(logits), **common
    )
    yield Problem(
        mode="call, gradient wanted, forward",
        runs={"ppomax cpu": lambda: public(leaf), BARE: bare},
        truth=lambda: reference(logits),
        **common,
    )
    yield Problem(
        mode="call, forward+backward",
        runs={"ppomax cpu": grad_of(lambda: public(leaf), [leaf], [up]), BARE: bare_both},
        truth=grad_of(lambda: reference(leaf), [leaf], [up]),
        **common,
    )


def _gae() -> Iterator[Problem]:
    rewards, values = torch.randn(1, 8), torch.randn(1, 8)
    advantages, returns = torch.empty(1, 8), torch.empty(1, 8)
    lib = abi.library()
    args = (
        rewards.data_ptr(), 0, 8, values.data_ptr(), 0, 8, None, 0, None, 1, 8, 1.0, 0.95, None, 0, None, 0,
        advantages.data_ptr(), returns.data_ptr(), 1,
    )  # fmt: skip

    def bare() -> Sequence[Tensor]:
        lib.ppomax_gae_cpu(*args)
        return advantages, returns

    yield Problem(
        op="gae",
        mode="call",
        dtype=torch.float32,
        shape="1x8",
        runs={"ppomax cpu": lambda: K.gae(rewards, values), BARE: bare},
        truth=lambda: K.gae(rewards, values, impl="ref"),
        tolerance=1e-5,
    )

"""The table of what can be measured: the name on the command line, and who makes its problems."""

from collections.abc import Callable, Iterator, Mapping

import torch

from . import cases, cases_call, cases_linear, cases_trunk
from .problem import Problem

Make = Callable[[torch.device, torch.dtype, str], Iterator[Problem]]

OPS: Mapping[str, Make] = {
    "token_logprobs": cases.token_logprobs,
    "linear_token_logprobs": cases_linear.linear_token_logprobs,
    "linear_ppo_loss": cases_linear.linear_ppo_loss,
    "linear_nll": cases_linear.linear_nll,
    "gae": cases.gae,
    "losses": cases.losses,
    "elementwise": cases.elementwise,
    "sample": cases.sample,
    "attention": cases_trunk.attention,
    "trunk": cases_trunk.trunk,
    "calls": cases_call.calls,
}


def find(op: str, mode: str, size: str, device: torch.device, dtype: torch.dtype) -> Problem:
    """The one problem of that op and mode."""
    for problem in OPS[op](device, dtype, size):
        if problem.mode == mode:
            return problem
    raise KeyError(f"no problem {op!r} with mode {mode!r}")

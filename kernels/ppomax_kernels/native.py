"""The ctypes face of the C ABI on CPUs."""

from collections.abc import Callable
from typing import Any


def _missing(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise RuntimeError(f"{name}: the compiled library is not there")

    return call


token_logprobs_cpu = _missing("token_logprobs")
token_logprobs_backward_cpu = _missing("token_logprobs")
kl_penalty_cpu = _missing("kl_penalty")
kl_penalty_backward_cpu = _missing("kl_penalty")
token_rewards_cpu = _missing("token_rewards")
gae_cpu = _missing("gae")
moments_cpu = _missing("whiten")
whiten_cpu = _missing("whiten")
ppo_loss_cpu = _missing("ppo_loss")
value_loss_cpu = _missing("value_loss")

"""One trained model: module, optimiser, schedule, gradient clip, and what a checkpoint keeps of them.

Plain torch. A sharded model (zero.py) has the same face: `module`, `call`, `gathered`, `backward`, `grad_norm`, `step`,
`skip`, `lazy`, `load`. Losses reach a module through `call`, and sampling through `gathered`, since under ZeRO-3 no
weight is there outside of the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ppomax.config import OptimConfig
from ppomax.sharding.ranks import sum_in_place
from ppomax.sharding.weights import Lazy, copy_into, lazy_weights, named_tensors

M = TypeVar("M", bound=nn.Module)


UNWARMED = 0.1
"""Of all steps: the time scale of `inverse_sqrt` where no warm-up gives it one. Otherwise its hundredth step would have
a tenth of the rate, however long the run."""


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step `step` (from 0): max(s/W, min_ratio) in the warm-up of W steps, then the
    schedule."""
    warm = round(config.warmup * total_steps)
    position = step + 1
    if position <= warm:
        return config.lr * max(position / warm, config.min_ratio)
    if config.schedule == "inverse_sqrt":
        scale = warm or max(1.0, UNWARMED * total_steps)
        since = position - warm if warm else step
        return config.lr * math.sqrt(scale / (scale + since))
    done = min(1.0, (position - warm) / max(1, total_steps - warm))
    if config.schedule == "linear":
        return config.lr * (1 - (1 - config.min_ratio) * done)
    if config.schedule == "cosine":
        return config.lr * (config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
    return config.lr


def in_use(module: nn.Module) -> AbstractContextManager[None]:
    """What a module that borrows another's weights needs around a backward in which blocks run again."""
    return getattr(module, "in_use", nullcontext)()  # type: ignore[no-any-return]


class Trained(Generic[M]):
    """A module under AdamW.

    Gradients add up over `backward` calls until `step` or `skip`. Parameters in 16 bit are stepped through float32
    copies, since updates of 1e-6 would vanish in their rounding. The learning rate is a function of the step count
    alone."""

    def __init__(self, module: M, config: OptimConfig, total_steps: int):
        self.module, self.config, self.total_steps = module, config, total_steps
        self.steps = 0
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.params = [p for p in module.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError(
                "Trained: the module has no parameter with requires_grad=True; unfreeze what is to be trained"
            )
        self.copies = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.copies, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return lr_at(self.steps, self.total_steps, self.config)

    sharded = False
    """Whether weights lie in parts on the ranks, and are gathered only inside `call` and `gathered`."""

    def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """`function(module, *args, **named)` with the module's weights in reach."""
        return function(self.module, *args, **named)

    @contextmanager
    def gathered(self) -> Iterator[M]:
        """The module with all weights whole and no hook on its forward, for a phase of many forwards without
        gradient."""
        yield self.module

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of `loss`; `last` before `grad_norm`, where ranks sum what they have."""
        with in_use(self.module):
            loss.backward()

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, 0-d float32."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if not grads:
            return torch.zeros((), device=self.params[0].device)
        return torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)).norm()

    @torch.no_grad()
    def step(self, norm: Tensor, lr: float | None = None) -> None:
        """Clip by `norm` (of `grad_norm`), step, clear the gradient. With `lr` the schedule is left where it is."""
        for p, copy in zip(self.params, self.copies, strict=True):
            if copy is not p:
                copy.grad = None if p.grad is None else p.grad.float()
        if self.config.grad_clip is not None:
            factor = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([c.grad for c in self.copies if c.grad is not None], factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr if lr is None else lr
        self.optimizer.step()
        for p, copy in zip(self.params, self.copies, strict=True):
            if copy is not p:
                p.copy_(copy)
        self.skip(advance=lr is None)

    def skip(self, *, advance: bool = True) -> None:
        """Clear the gradient without touching the weights; `advance` goes on to the next step's learning rate."""
        for p, copy in zip(self.params, self.copies, strict=True):
            p.grad = copy.grad = None
        self.steps += advance

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights by name (tied ones once), and optimiser state as `<kind>/<name>`."""
        weights, state = self.lazy()
        return ({n: x.get() for n, x in weights.items()}, {n: x.get() for n, x in state.items()})

    def lazy(self) -> tuple[dict[str, Lazy], dict[str, Lazy]]:
        """The same, each tensor made whole when it is asked for."""
        state: dict[str, Tensor] = {}
        for name, p, copy in zip(self.names, self.params, self.copies, strict=True):
            state.update({f"{kind}/{name}": x for kind, x in self.optimizer.state.get(copy, {}).items()})
            if copy is not p:
                state[f"copy/{name}"] = copy
        weights = named_tensors(self.module)
        return ({n: Lazy.of(x) for n, x in weights.items()}, {n: Lazy.of(x) for n, x in state.items()})

    def all_weights(self) -> dict[str, Lazy]:
        """Every weight by name, frozen ones too (tied ones once)."""
        return lazy_weights(self.module)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], steps: int) -> None:
        """Put back what `tensors` gave. Raises ValueError if a name or shape does not match."""
        copy_into(self.module, weights)
        self.optimizer.state.clear()
        for key, x in state.items():
            kind, _, name = key.partition("/")
            if name not in self.names:
                raise ValueError(
                    f"optimiser state for {name}, which this model does not train; resume with the model it was "
                    "saved from"
                )
            copy = self.copies[self.names.index(name)]
            if kind == "copy":
                copy.copy_(x)
            else:
                # AdamW's fused form keeps its step counts beside the parameters.
                self.optimizer.state[copy][kind] = x.to(copy.device, copy=True)
        self.steps = steps


class DataParallel(Trained[M]):
    """The same on each of several ranks (ZeRO stage 0): whole model and optimiser everywhere, gradients summed."""

    BUCKET = 1 << 25
    """Numbers summed over ranks in one message."""

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Sum the gradients of all ranks, in float32; L2 norm of the sum."""
        for p in self.params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        bucket: list[Tensor] = []
        for p in self.params:
            bucket.append(p.grad)  # type: ignore[arg-type]
            if sum(map(Tensor.numel, bucket)) >= self.BUCKET:
                sum_in_place(bucket)
                bucket.clear()
        sum_in_place(bucket)
        return super().grad_norm()

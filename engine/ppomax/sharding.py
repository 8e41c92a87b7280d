"""One trained model: module, optimiser, schedule, gradient clip, and what a checkpoint keeps of them.

Plain torch, one process. A sharded engine joins by offering the same face: `module`, `backward`, `grad_norm`, `step`,
`skip`, `tensors`, `load`; and by making `total` and `gather` sum and join over its ranks."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ppomax.config import OptimConfig

M = TypeVar("M", bound=nn.Module)


def total(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks: the global count behind every token mean. One process: `x`."""
    return x


def gather(x: Tensor) -> Tensor:
    """`x` (n, ...) of every rank, joined in rank order. One process: `x`."""
    return x


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step `step` (from 0): max(s/W, min_ratio) in the warm-up of W steps, then the
    schedule."""
    warm = round(config.warmup * total_steps)
    position = step + 1
    if position <= warm:
        return config.lr * max(position / warm, config.min_ratio)
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(max(warm, 1) / position) if warm else config.lr / math.sqrt(position)
    done = min(1.0, (position - warm) / max(1, total_steps - warm))
    if config.schedule == "linear":
        return config.lr * (1 - (1 - config.min_ratio) * done)
    if config.schedule == "cosine":
        return config.lr * (config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
    return config.lr


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

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
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
        persistent = self.module.state_dict().keys()
        buffers = {n: b for n, b in self.module.named_buffers() if n in persistent}
        weights = {**dict(self.module.named_parameters()), **buffers}
        state: dict[str, Tensor] = {}
        for name, p, copy in zip(self.names, self.params, self.copies, strict=True):
            state.update({f"{kind}/{name}": x for kind, x in self.optimizer.state.get(copy, {}).items()})
            if copy is not p:
                state[f"copy/{name}"] = copy
        return ({n: x.detach() for n, x in weights.items()}, state)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor], steps: int) -> None:
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


@torch.no_grad()
def copy_into(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy named weights into `module` in place; ValueError names what is missing, unknown or of another shape."""
    persistent = module.state_dict().keys()
    targets = {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in persistent}}
    odd = sorted(targets.keys() ^ weights.keys())
    if odd:
        raise ValueError(
            f"weights do not fit the model: {odd[0]} is in one and not in the other ({len(odd)} such names)"
        )
    for name, x in weights.items():
        if targets[name].shape != x.shape:
            raise ValueError(
                f"weights do not fit the model: {name} is {tuple(x.shape)}, the model wants "
                f"{tuple(targets[name].shape)}"
            )
        targets[name].copy_(x)

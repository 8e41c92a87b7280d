"""A trained or frozen model under DeepSpeed ZeRO, behind the face of plain.py.

What is kept from DeepSpeed: partitions, offload, gathering, reduction, its clip (the same formula as ours). What is
not: its mean over ranks (losses are already shares of a global mean, so each is multiplied by the world size first),
its schedule and its loss scale (none is needed in float32 and bfloat16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ppomax.config import OptimConfig, ShardingConfig
from ppomax.sharding import ranks, zero_config
from ppomax.sharding.plain import Trained, in_use
from ppomax.sharding.weights import (
    Lazy,
    copy_into,
    cut_off,
    lazy_weight,
    named_tensors,
    part_of,
    shape_of,
    stretch_in,
)
from ppomax.sharding.zero_engine import LossModule, gathered, initialize, register_heads

M = TypeVar("M", bound=nn.Module)
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroTrained(Trained[M]):
    """A module under AdamW whose optimiser (ZeRO 1), gradients (2) and weights (3) are cut over the ranks."""

    def __init__(self, module: M, config: OptimConfig, total_steps: int, sharding: ShardingConfig, stage: int):
        self.module, self.config, self.total_steps, self.stage = module, config, total_steps, stage
        self.steps, self.reduced, self.sharded = 0, False, stage == 3
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(
                "Trained: the module has no parameter with requires_grad=True; unfreeze what is to be trained"
            )
        self.names, self.params = [name for name, _ in named], [p for _, p in named]
        # torch's fused AdamW works on GPU and CPU partitions alike, so that offloading needs no compiler.
        basic = torch.optim.AdamW(
            self.params, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        settings = zero_config.trained(sharding, stage, self.params[0].dtype, config.grad_clip)
        self.engine = initialize(LossModule(module), settings, optimizer=basic)
        self.zero: Any = self.engine.optimizer
        if stage == 3:
            register_heads(self.engine.module)

    def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return self.engine(function, *args, **named)

    @contextmanager
    def gathered(self) -> Iterator[M]:
        if self.stage < 3:
            yield self.module
            return
        with gathered(self.engine):
            yield self.module

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        with in_use(self.module):
            self.engine.backward(loss * ranks.world_size())
        if self.stage == 3:
            # What no hook of the backward has released (the head, whose module is not what uses it) is let go here, or
            # it is there in the next forward on some ranks and fetched on others, which then wait for each other.
            self.zero.parameter_offload.partition_all_parameters()
        self.reduced = last

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient over all ranks; NaN where DeepSpeed has its mark for a norm that is not
        finite."""
        if not self.reduced:
            raise RuntimeError("grad_norm: no backward(..., last=True) came before it, so ranks have not summed yet")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # offloaded gradients may still be on their way to the host
        norms = self.zero._get_norm_groups() if self.stage == 3 else [self.zero.scaled_global_norm()]
        norm = torch.stack([torch.as_tensor(n).float() for n in norms])
        return torch.where((norm < 0).any(), norm.new_tensor(float("nan")), norm.norm())

    def step(self, norm: Tensor, lr: float | None = None) -> None:
        for group in self.zero.optimizer.param_groups:
            group["lr"] = self.lr if lr is None else lr
        self.engine.step()
        self.reduced = False
        self.steps += lr is None

    def skip(self, *, advance: bool = True) -> None:
        """DeepSpeed forgets gradients only in a step that it takes for an overflow: so it is told that this is one."""
        zero = self.zero
        shadowed: dict[str, Callable[..., Any]] = {"has_overflow": lambda *a, **k: True}
        if self.stage == 3:
            shadowed = {"_get_norm_groups": lambda: [torch.tensor(-1.0, device=self.engine.device)]}
        checked = getattr(zero, "check_grad_overflow", None)
        zero.check_grad_overflow = True
        for name, method in shadowed.items():
            setattr(zero, name, method)
        try:
            self.engine.step()
        finally:
            for name in shadowed:
                delattr(zero, name)
            zero.check_grad_overflow = checked
        self.reduced = False
        self.steps += advance

    # ---- what a checkpoint keeps: the layout of plain.py, so that any other number of ranks can go on ----

    def lazy(self) -> tuple[dict[str, Lazy], dict[str, Lazy]]:
        weights = {name: lazy_weight(x) for name, x in named_tensors(self.module).items()}
        state: dict[str, Lazy] = {}
        started = self._state_started()
        for name, p in zip(self.names, self.params, strict=True):
            shape = shape_of(p)
            if started:
                at = float(next(iter(self._flat_states()))["step"])
                state[f"step/{name}"] = Lazy.of(torch.tensor(at))
                for kind in MOMENTS:
                    state[f"{kind}/{name}"] = Lazy(torch.float32, shape, _reader(p, kind), _own_reader(p, kind))
            if p.dtype != torch.float32:
                state[f"copy/{name}"] = Lazy(torch.float32, shape, _reader(p, None), _own_reader(p, None))
        return weights, state

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], steps: int) -> None:
        unknown = [key for key in state if key.partition("/")[2] not in self.names]
        if unknown:
            raise ValueError(
                f"optimiser state for {unknown[0].partition('/')[2]}, which this model does not train; resume with the "
                "model it was saved from"
            )
        copy_into(self.module, weights)
        self._start_state(any(key.startswith("step/") for key in state))
        for name, p in zip(self.names, self.params, strict=True):
            self._write_state(p, state if f"copy/{name}" in state else None, f"copy/{name}", None)
            for kind in MOMENTS:
                if f"{kind}/{name}" in state:
                    self._write_state(p, state, f"{kind}/{name}", kind)
        step = next((state[key] for key in state if key.startswith("step/")), None)
        if step is not None:
            for flat in self._flat_states():
                flat["step"] = step.clone()
        self.steps = steps

    def _flat(self) -> list[Tensor]:
        """This rank's float32 partitions, which the optimiser steps."""
        three = self.stage == 3
        return list(self.zero.fp32_partitioned_groups_flat if three else self.zero.single_partition_of_fp32_groups)

    def _flat_states(self) -> Iterator[dict[str, Tensor]]:
        return (self.zero.optimizer.state[flat] for flat in self._flat())

    def _state_started(self) -> bool:
        return all("exp_avg" in state for state in self._flat_states())

    def _start_state(self, wanted: bool) -> None:
        """AdamW's state before its first step: zeros; or none at all."""
        for flat in self._flat():
            self.zero.optimizer.state.pop(flat, None)
            if wanted:
                self.zero.optimizer.state[flat] = {
                    "step": torch.tensor(0.0), **{kind: torch.zeros_like(flat) for kind in MOMENTS}
                }  # fmt: skip
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            if wanted:
                self.zero._lazy_init_hp_params_optimizer_state()

    def _write_state(self, p: Tensor, tensors: Mapping[str, Tensor] | None, name: str, kind: str | None) -> None:
        """This rank's stretch of a master weight (`kind` None) or moment; without `tensors`, of the weight that is in
        place."""
        if self.stage == 3:
            part = p.ds_tensor if tensors is None else part_of(p, tensors, name)  # type: ignore[attr-defined]
            self.zero.set_local_hp_param(part.detach().float().to(p.device), p, kind)
        elif (held := p._hp_mapping) is not None:  # type: ignore[attr-defined]
            at = held.lp_fragment_address
            stop = at.start + at.numel
            part = (
                p.detach().flatten()[at.start : stop] if tensors is None else stretch_in(tensors, name, at.start, stop)
            )
            held.get_hp_fragment(kind).copy_(part)


class ZeroFrozen(Generic[M]):
    """A frozen model cut over the ranks (ZeRO-3 without an optimiser), each layer fetched as its forward comes."""

    def __init__(self, module: M, sharding: ShardingConfig):
        self.module = module
        dtype = next(module.parameters()).dtype
        self.engine = initialize(LossModule(module), zero_config.frozen(sharding, dtype))
        register_heads(self.engine.module)

    def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """`function(module, *args, **named)`, without gradient; every rank must call as often as the others."""
        with torch.no_grad():
            return self.engine(function, *args, **named)

    @contextmanager
    def gathered(self) -> Iterator[M]:
        """The module with all weights whole."""
        with gathered(self.engine):
            yield self.module


def _own_reader(p: Tensor, kind: str | None) -> Callable[[], tuple[int, Tensor]]:
    """This rank's stretch of the master weight (`kind` None) or a moment of `p`."""

    def own() -> tuple[int, Tensor]:
        import deepspeed.utils as api

        if hasattr(p, "ds_id"):
            part = api.safe_get_local_fp32_param(p) if kind is None else api.safe_get_local_optimizer_state(p, kind)
            return cut_off(p, part.detach())
        held = p._hp_mapping  # type: ignore[attr-defined]
        if held is None:
            return 0, torch.zeros(0)
        return held.lp_fragment_address.start, held.get_hp_fragment(kind).detach().flatten()

    return own


def _reader(p: Tensor, kind: str | None) -> Callable[[], Tensor]:
    def get() -> Tensor:
        import deepspeed.utils as api

        found = api.safe_get_full_fp32_param(p) if kind is None else api.safe_get_full_optimizer_state(p, kind)
        return found.detach()  # type: ignore[no-any-return]

    return get

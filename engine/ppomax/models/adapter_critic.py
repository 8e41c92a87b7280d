"""A critic that is adapters and a head on weights that are there anyway: those of the frozen reward model, or of a
policy that is trained by adapters itself. No second model is held.

Its low-rank terms are added by hooks on the base's linear layers, while it is in use alone: the base stays what it is
for who else reads it, and the policy's own adapters are off meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppomax.config import ModelConfig
from ppomax.models.adapters import AdapterKnobs, adapters_off, chosen_layers, has_adapters
from ppomax.models.branch import TrunkCritic
from ppomax.models.critic import Critic, RewardModel, make_critic
from ppomax.models.frozen_bits import place
from ppomax.models.head import head_of
from ppomax.models.packed import packed_hidden
from ppomax.models.score_head import Scale, draw_score_head
from ppomax.models.trunk import freeze

NO_REWARD_MODEL = (
    "Engine: model.critic is reward_model, but the reward is no model; set model.critic: policy, or a path"
)


class AdapterCritic(nn.Module):
    """A scalar at every token, as Critic: values = gain * ((score head in fp32)(hidden) + offset) + shift.

    base: a causal LM, or the model of a reward model, its weights frozen or trained by adapters alone. start: the
    reward model whose head this one starts as, its length taken out (see take_length_out); None: a new head. Adapters
    start at no effect, so the first values are those of the start."""

    base: PreTrainedModel
    layers: list[nn.Module]

    def __init__(self, base: PreTrainedModel, config: AdapterKnobs, *, start: Critic | None = None, seed: int = 0):
        super().__init__()
        layers = list(chosen_layers(base, config).values())
        # Not parts of this module: who holds the base trains it or not, saves it and moves it.
        self.__dict__.update(base=base, layers=layers)
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers:
            read, written = widths(layer)
            drawn = (2 * torch.rand(config.lora_rank, read, generator=generator) - 1) / read**0.5
            where: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            self.down.append(nn.Parameter(drawn.to(**where)))
            self.up.append(nn.Parameter(torch.zeros(written, config.lora_rank, **where)))
        self.factor = config.lora_alpha / config.lora_rank
        self.scale, self.offset, self.raw = Scale(), 0.0, start is not None
        head = getattr(base, "score", None)
        width = head.in_features if isinstance(head, nn.Linear) else head_of(base).weight.shape[1]
        self.score = nn.Linear(width, 1, bias=False, device=base.device, dtype=base.dtype)
        if start is None:
            draw_score_head(self.score.weight, seed)
        else:
            self._start_as(start)

    @torch.no_grad()
    def _start_as(self, start: Critic) -> None:
        if start.score.bias is not None:
            raise ValueError(
                f"AdapterCritic: the head of {type(start.model).__name__} has a bias; set model.critic_train: full"
            )
        length = float(start.score.weight.float().norm()) or 1.0
        self.score.weight.copy_(start.score.weight / length)
        self.scale.gain, self.offset = length, start.offset / length

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the base's linear layers give this critic's outputs: for forwards, and for the backward of one whose
        blocks run again there."""
        with ExitStack() as held:
            if has_adapters(self.base):
                held.enter_context(adapters_off(self.base))
            for down, up, layer in zip(self.down, self.up, self.layers, strict=True):
                held.callback(layer.register_forward_hook(_Low(down, up, self.factor)).remove)
            yield

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """tokens (N,), cu_seqlens (S+1,) -> (N, D), what the head sees."""
        with self.in_use():
            return packed_hidden(self.base, tokens, cu_seqlens)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """tokens (N,), cu_seqlens (S+1,) -> values (N,) fp32; the value at t has seen tokens up to and with t."""
        return self.values_of(self.hidden(tokens, cu_seqlens))

    def values_of(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> values (N,) fp32."""
        found = nn.functional.linear(hidden.float(), self.score.weight.float())[:, 0]
        return self.scale.of(found + self.offset if self.offset else found)


AnyCritic = Critic | TrunkCritic | AdapterCritic


def widths(layer: nn.Module) -> tuple[int, int]:
    """What a linear layer reads and writes; GPT-2's hold their weight transposed."""
    rows, columns = layer.weight.shape  # type: ignore[misc, union-attr]
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


class _Low:
    """A hook that adds factor * up(down(input)) to a layer's output."""

    def __init__(self, down: Tensor, up: Tensor, factor: float):
        self.down, self.up, self.factor = down, up, factor

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(given[0], self.down), self.up)
        return output + self.factor * low


def adapter_critic(
    start: str | Path,
    policy: PreTrainedModel,
    reward_model: RewardModel | None,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    seed: int,
) -> AdapterCritic:
    """What `model.critic_train: lora` makes of `model.critic`: `reward_model`, `policy`, or a path, whose model is then
    read, frozen. ValueError: there is no reward model."""
    if start == "policy":
        return AdapterCritic(policy, config, seed=seed)
    if start == "reward_model":
        if reward_model is None:
            raise ValueError(NO_REWARD_MODEL)
        return AdapterCritic(reward_model.model, config, start=reward_model, seed=seed)
    found = make_critic(start, dtype, seed=seed)
    place(freeze(found), policy.device, config)
    return AdapterCritic(found.model, config, start=found if found.raw else None, seed=seed)

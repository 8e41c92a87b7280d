"""TRL's older PPO (up to 0.11): a model with a value head, `generate`, and `step(queries, responses, scores)`.

    model = AutoModelForCausalLMWithValueHead.from_pretrained(path)
    trainer = PPOTrainer(PPOConfig(learning_rate=1.41e-5), model, None, tokenizer)
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=48)
    stats = trainer.step(queries, responses, scores)
For code that is pinned to trl<0.12, on today's torch and transformers, without TRL. Losses and advantages are TRL's;
one optimiser trains policy and value head together, as there. Sequences travel packed, and no logits are kept.
By design otherwise: responses are drawn from our random streams; whitened rewards stay 0 where no token is, where TRL's
padding got some; `kl_penalty="full"` and early stopping are not there. Needs accelerate; one process or DDP."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ppomax_kernels as K
import torch
from torch import Tensor, nn

from ppomax.config import ConfigError, KLConfig
from ppomax.integrations.trl.batch import Batch, laid_out, plain, whitened
from ppomax.integrations.trl.value_head import AutoModelForCausalLMWithValueHead
from ppomax.models import head_of, packed_hidden
from ppomax.recipe.moments import RunningMoments
from ppomax.recipe.rewards import KLController
from ppomax.recipe.scoring import head_logprobs
from ppomax.rollout import Sampling, decode

ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2"}
"""TRL's names of the KL estimates."""
GENERATION = {"max_new_tokens", "min_new_tokens", "min_length", "temperature", "top_k", "top_p", "do_sample",
              "eos_token_id", "pad_token_id", "seed"}  # fmt: skip
FIGURES = ("approx_kl", "clipfrac", "ratio_mean", "entropy")


__all__ = ["AutoModelForCausalLMWithValueHead", "PPOConfig", "PPOTrainer"]


@dataclass
class PPOConfig:
    """Fields of TRL 0.11's PPOConfig that bear on learning, with its defaults."""

    model_name: str | None = None
    learning_rate: float = 1.41e-5
    batch_size: int = 128
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 4
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: Literal["kl", "abs", "mse"] = "kl"
    target: float = 6.0
    horizon: int = 10000
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    whiten_rewards: bool = False
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    ratio_threshold: float = 10.0
    max_grad_norm: float | None = None
    seed: int = 0
    impl: str = "auto"
    """Back-end of ppomax's kernels."""

    def __post_init__(self) -> None:
        whole = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % whole:
            raise ConfigError(
                f"PPOConfig: batch_size={self.batch_size} must be a multiple of mini_batch_size * "
                f"gradient_accumulation_steps = {whole}"
            )
        if self.kl_penalty not in ESTIMATORS:
            raise ConfigError(f"PPOConfig: kl_penalty must be one of {', '.join(ESTIMATORS)}, got {self.kl_penalty!r}")


class PPOTrainer:
    """`generate` and `step` on a model with a value head.

    ref_model: a causal LM or one with a value head; None: `model` as it is now, or with its adapters off. tokenizer:
    for its EOS token. dataset, data_collator: make `dataloader`, batches of config.batch_size. optimizer: None is
    Adam."""

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        from accelerate import Accelerator

        self.config, self.tokenizer = config, tokenizer
        self.accelerator = Accelerator(gradient_accumulation_steps=config.gradient_accumulation_steps)
        self.is_peft_model = plain(model.pretrained_model) is not model.pretrained_model
        if ref_model is None and not self.is_peft_model:
            ref_model = copy.deepcopy(model.pretrained_model)
        self.ref_model = getattr(ref_model, "pretrained_model", ref_model)
        if self.ref_model is not None:
            self.ref_model = self.ref_model.requires_grad_(False).eval().to(self.accelerator.device)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer or torch.optim.Adam(trained, lr=config.learning_rate)
        self.lr_scheduler = lr_scheduler
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.dataloader = None
        if dataset is not None:
            loader = torch.utils.data.DataLoader(
                dataset, config.batch_size, shuffle=True, collate_fn=data_collator, drop_last=True
            )
            self.dataloader = self.accelerator.prepare(loader)
        kl = KLConfig(
            coef=config.init_kl_coef, controller="adaptive" if config.adap_kl_ctrl else "fixed", target=config.target,
            horizon=config.horizon,
        )  # fmt: skip
        self.kl_ctl, self.moments, self.drawn = KLController(kl), RunningMoments(), 0
        self.current_device = self.accelerator.device

    @property
    def _lm(self) -> Any:
        return plain(self.accelerator.unwrap_model(self.model).pretrained_model)

    @torch.no_grad()
    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        batch_size: int = 64,
        return_prompt: bool = True,
        **generation: Any,
    ) -> Any:
        """A response to each query, 1-d id tensors of their own lengths: a list for a list, else (1, T). `generation`:
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, do_sample, eos_token_id, seed, as transformers' ones;
        batch_size: sequences decoded at once. Draws nothing from torch's generators."""
        unknown = generation.keys() - GENERATION
        if unknown:
            raise ConfigError(
                f"generate: {', '.join(sorted(unknown))} is not served; known are {', '.join(sorted(GENERATION))}"
            )
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        eos = generation.get("eos_token_id", getattr(self.tokenizer, "eos_token_id", None))
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        greedy = not generation.get("do_sample", True)
        found = decode(
            self._lm,
            [q.tolist() for q in queries],
            range(self.drawn, self.drawn + len(queries)),
            Sampling(
                generation.get("max_new_tokens", 32),
                min_new_tokens=max(0, generation.get("min_new_tokens") or generation.get("min_length") or 0),
                temperature=0.0 if greedy else generation.get("temperature", 1.0),
                top_k=int(generation.get("top_k") or 0),
                top_p=generation.get("top_p", 1.0),
                seed=generation.get("seed", self.config.seed),
                slots=batch_size,
                impl=self.config.impl,
            ),
            eos_ids=[e for e in ends if e >= 0],
        )
        self.drawn += len(queries)
        responses = [torch.tensor(t, device=q.device) for t, q in zip(found.tokens, queries, strict=True)]
        if return_prompt:
            responses = [torch.cat([q, r]) for q, r in zip(queries, responses, strict=True)]
        return responses[0][None] if isinstance(query_tensor, Tensor) else responses

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor | float],
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, float]:
        """PPO epochs over one batch. queries, responses: batch_size 1-d id tensors, none empty; scores: one number
        each; response_masks: 0 where a response token is not the policy's own. Returns TRL's statistics."""
        began = time.perf_counter()
        rewards = self._scores(queries, responses, scores)
        batch = laid_out([q.tolist() for q in queries], [r.tolist() for r in responses], self.current_device)
        if response_masks is not None:
            batch = batch._replace(sampled=torch.cat(list(response_masks)).to(self.current_device).bool())
        batch, kl = self._experience(batch, rewards)
        figures = torch.stack(self._epochs(batch)).mean(0)
        count = len(queries)
        total_kl = float(kl.sum() / count)
        stats = self._stats(batch, rewards, total_kl, figures)
        self.kl_ctl.update(total_kl, count * self.accelerator.num_processes)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return stats | {"time/ppo/total": time.perf_counter() - began}

    def log_stats(self, stats: dict[str, float], batch: Any = None, rewards: Any = None, **_: Any) -> None:
        """Of `step`, to accelerate's trackers where some were set up."""
        self.accelerator.log(stats)

    def save_pretrained(self, folder: str | Path) -> None:
        """The model, its value head and the tokenizer."""
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, self.tokenizer)

    def _scores(self, queries: Sequence[Tensor], responses: Sequence[Tensor], scores: Sequence[Any]) -> Tensor:
        """Checked, scaled, clipped: (S,) float32."""
        size = self.config.batch_size
        for name, given in (("queries", queries), ("responses", responses), ("scores", scores)):
            if len(given) != size:
                raise ValueError(f"step: {name} must be {size} (batch_size), got {len(given)}")
        for name, given in (("queries", queries), ("responses", responses)):
            odd = next((i for i, x in enumerate(given) if x.dim() != 1 or not len(x)), None)
            if odd is not None:
                raise ValueError(
                    f"step: {name}[{odd}] must be a 1-d id tensor, not empty, got shape {tuple(given[odd].shape)}"
                )
        found = torch.stack([torch.as_tensor(x, dtype=torch.float32).reshape(()) for x in scores]).to(
            self.current_device
        )
        if not torch.isfinite(found).all():
            raise ValueError("step: scores must be finite numbers")
        if self.config.use_score_scaling:
            self.moments = self.moments.with_scores(found)
            shift = self.moments.mean if self.config.use_score_norm else 0.0
            found = (found - shift) / self.moments.std
        clip = self.config.score_clip
        return found if clip is None else found.clamp(-clip, clip)

    @torch.no_grad()
    def _experience(self, batch: Batch, scores: Tensor) -> tuple[Batch, Tensor]:
        """Log-probabilities, values, advantages and returns; and the KL at each slot."""
        config, model = self.config, self.accelerator.unwrap_model(self.model)
        parts = [batch.rows(part) for part in self._numbers(len(scores)).split(config.mini_batch_size)]
        off = model.pretrained_model.disable_adapter() if self.ref_model is None else contextlib.nullcontext()
        own = [_scored(model, part) for part in parts]
        with off:
            reference = self._lm if self.ref_model is None else plain(self.ref_model)
            ref = torch.cat([_logprobs(reference, part) for part in parts])
        logprobs, values = (torch.cat(x) for x in zip(*own, strict=True))
        on = batch.sampled.float()
        kl = K.kl_penalty(logprobs, ref, estimator=ESTIMATORS[config.kl_penalty], impl=config.impl)
        rewards = -self.kl_ctl.coef * kl
        rewards[batch.last_sampled()] += scores
        values, rewards = values * on, rewards * on
        if config.whiten_rewards:
            rewards = whitened(rewards, batch.sampled, keep_mean=True) * on
        advantages, returns = K.gae(
            rewards, values, batch.slot_cu, gamma=config.gamma, lam=config.lam, impl=config.impl
        )
        return (
            batch._replace(
                logprobs=logprobs, ref_logprobs=ref, values=values, returns=returns,
                advantages=whitened(advantages, batch.sampled),
            ),
            kl * on,
        )  # fmt: skip

    def _epochs(self, batch: Batch) -> list[Tensor]:
        """Rows of losses and figures, one a minibatch."""
        config, rows = self.config, []
        for _ in range(config.ppo_epochs):
            order = torch.from_numpy(np.random.permutation(config.batch_size)).to(self.current_device)
            for mini in order.split(config.mini_batch_size):
                with self.accelerator.accumulate(self.model):
                    policy, value, figures = self.model(learn=partial(_losses, batch=batch.rows(mini), config=config))
                    loss = policy + config.vf_coef * value
                    if float(figures[FIGURES.index("ratio_mean")]) > config.ratio_threshold:
                        loss = loss * 0.0  # as TRL: such a minibatch is not learnt from
                    self.accelerator.backward(loss)
                    if config.max_grad_norm is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                rows.append(torch.stack([policy.detach(), value.detach(), *figures]))
        return rows

    def _stats(self, batch: Batch, scores: Tensor, kl: float, figures: Tensor) -> dict[str, float]:
        policy, value, approx_kl, clipfrac, ratio, entropy = figures.tolist()
        lengths = batch.slot_cu.diff().float()
        on = batch.sampled
        return {
            "objective/kl": kl,
            "objective/kl_coef": self.kl_ctl.coef,
            "objective/entropy": float(-(batch.logprobs * on).sum() / len(scores)),
            "ppo/mean_scores": float(scores.mean()),
            "ppo/std_scores": float(scores.std()),
            "ppo/mean_non_score_reward": -self.kl_ctl.coef * kl / float(lengths.mean()),
            "ppo/loss/policy": policy,
            "ppo/loss/value": value,
            "ppo/loss/total": policy + self.config.vf_coef * value,
            "ppo/policy/approxkl": approx_kl,
            "ppo/policy/clipfrac": clipfrac,
            "ppo/policy/ratio": ratio,
            "ppo/policy/entropy": entropy,
            "ppo/policy/advantages_mean": float(batch.advantages[on].mean()),
            "ppo/returns/mean": float(batch.returns[on].mean()),
            "ppo/returns/var": float(batch.returns[on].var()),
            "ppo/val/mean": float(batch.values[on].mean()),
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens/responses_len_mean": float(lengths.mean()),
        }

    def _numbers(self, count: int) -> Tensor:
        return torch.arange(count, device=self.current_device)


def _hidden(lm: Any, batch: Batch) -> Tensor:
    return packed_hidden(lm, batch.tokens, batch.cu_seqlens)[batch.states]


def _logprobs(lm: Any, batch: Batch) -> Tensor:
    return head_logprobs(_hidden(lm, batch), head_of(lm), batch.labels)[0]


def _scored(model: AutoModelForCausalLMWithValueHead, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values of one forward."""
    lm = plain(model.pretrained_model)
    hidden = _hidden(lm, batch)
    return head_logprobs(hidden, head_of(lm), batch.labels)[0], model.v_head(hidden)


def _losses(model: AutoModelForCausalLMWithValueHead, batch: Batch, config: PPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Policy loss, value loss, and FIGURES, of one forward."""
    lm = plain(model.pretrained_model)
    head, hidden = head_of(lm), _hidden(lm, batch)
    for_head, bias = head.scaled(hidden)
    policy, figures = K.linear_ppo_loss(
        for_head, head.weight, batch.labels, batch.logprobs, batch.advantages, batch.sampled, bias=bias,
        softcap=head.softcap, clip_low=config.cliprange, clip_high=config.cliprange, impl=config.impl,
    )  # fmt: skip
    value, _ = K.value_loss(
        model.v_head(hidden), batch.values, batch.returns, batch.sampled, clip=config.cliprange_value, impl=config.impl
    )
    return policy, value, torch.stack([figures[name] for name in FIGURES]).detach()

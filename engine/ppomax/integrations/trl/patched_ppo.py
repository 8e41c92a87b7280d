"""TRL's own PPOTrainer with our rollout, logprobs, GAE and losses in its `train`; all else of it stays TRL's.

    from ppomax.integrations.trl import patch_ppo; patch_ppo()       then PPOTrainer(...).train() as before
A response has a slot for each token, and, where the batch's padded width has room for it, one for the state after the
last: TRL rewards that state and trains its value. Losses, advantages and steps are TRL's, but sequences travel packed,
the probability of a token is taken as it is sampled, and no logits are kept (tests/integrations/test_trl.py).
By design otherwise: responses are drawn from our random streams; `policy/approxkl_avg` is k3; figures of an update are
means over response tokens, where TRL counts padding in some of them, and in all of them the cells of a table that
several minibatches leave empty. One process, DDP, and ZeRO up to stage 2. Known: TRL 1.0 to 1.10, told by the source of
`train`."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import ppomax_kernels as K
import torch
from torch import Tensor

from ppomax.integrations import IntegrationError
from ppomax.integrations.trl.batch import Batch, laid_out, plain, whitened
from ppomax.models import head_of, packed_hidden
from ppomax.recipe.scoring import head_logprobs
from ppomax.rollout import Sampling, decode

KNOWN_SOURCES = {
    "276f960cae1255136dc535fdba9ea87c29f4c7d7c58e2df6eff944e2063de4e7": "1.0 to 1.9",
    "34134a152c9008448b6cfa0902cb55c5be330cc1989eb0250891e0dee93b0d74": "1.10",
}
"""sha256 of the source of PPOTrainer.train, and the TRL that it is of."""
METRICS = ("clipfrac", "ratio_mean", "approx_kl", "entropy")
"""Those of ppo_loss that are logged."""


def patch_ppo() -> None:
    """Put `train` of ours in the place of trl.experimental.ppo.PPOTrainer's. IntegrationError: it is of a TRL that we
    do not know."""
    ppo_trainer: Any = import_module("trl.experimental.ppo.ppo_trainer")
    trainer, wrapper = ppo_trainer.PPOTrainer, ppo_trainer.PolicyAndValueWrapper
    if trainer.train is train:
        return
    check_source(trainer.train)
    wrapper.forward = _with_losses(wrapper.forward)
    trainer.train = train


def check_source(function: Any) -> None:
    """IntegrationError unless `function` is, to the letter, one that ours was written to stand in for."""
    found = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    if found not in KNOWN_SOURCES:
        known = " and ".join(KNOWN_SOURCES.values())
        raise IntegrationError(
            f"{function.__qualname__} of trl {version('trl')} is not that of trl {known}: "
            "its source has changed, and with it perhaps the loss; install a version that is known, or use "
            "ppomax.integrations.trl.PPOTrainer, which needs none"
        )


# ---- one batch ------------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Of one micro-batch."""

    policy: Tensor
    value: Tensor
    figures: Tensor
    """METRICS of the policy, and the value's clipped share."""


def _with_losses(forward: Any) -> Any:
    """PolicyAndValueWrapper.forward, which given a Batch gives Losses: in a forward, so that DDP and DeepSpeed see
    it."""

    def either(self: Any, batch: Batch | None = None, args: Any = None, **named: Any) -> Any:
        return forward(self, **named) if batch is None else _losses(self, batch, args)

    return either


def _losses(wrapper: Any, batch: Batch, args: Any) -> Losses:
    policy = plain(wrapper.policy)
    head = head_of(policy)
    hidden, bias = head.scaled(packed_hidden(policy, batch.tokens, batch.cu_seqlens)[batch.states])
    policy_loss, figures = K.linear_ppo_loss(
        hidden,
        head.weight,
        batch.labels,
        batch.logprobs,
        batch.advantages,
        batch.sampled,
        bias=bias,
        temperature=args.temperature + 1e-7,
        softcap=head.softcap,
        clip_low=args.cliprange,
        clip_high=args.cliprange,
    )
    value_loss, of_values = K.value_loss(
        _values(wrapper.value_model, batch), batch.values, batch.returns, clip=args.cliprange_value
    )
    shown = [figures[name] for name in METRICS] + [of_values["clipfrac"]]
    return Losses(policy_loss, value_loss, torch.stack(shown).detach())


def _values(model: Any, batch: Batch) -> Tensor:
    """V of each slot's state, (N,) float32."""
    hidden = packed_hidden(model, batch.tokens, batch.cu_seqlens)[batch.states]
    return model.score(hidden)[:, 0].float()  # type: ignore[no-any-return]


@torch.no_grad()
def _collect(self: Any, queries: Tensor, update: int) -> tuple[Batch, dict[str, float]]:
    """Sample, score, reward and estimate advantages; also what is logged of it."""
    args, pad = self.args, self.processing_class.pad_token_id
    wrapper = self.accelerator.unwrap_model(self.model)
    policy, device = plain(wrapper.policy), queries.device
    prompts = [[t for t in row if t != pad] for row in queries.tolist()]
    first = ((update - 1) * self.accelerator.num_processes + self.accelerator.process_index) * len(prompts)
    found = decode(
        policy,
        prompts,
        range(first, first + len(prompts)),
        Sampling(
            args.response_length, temperature=args.temperature + 1e-7, seed=args.seed,
            slots=args.local_rollout_forward_batch_size,
        ),
        eos_ids=[] if self.stop_token_id is None else [self.stop_token_id],
    )  # fmt: skip
    width = max(map(len, found.tokens))
    responses = [r[: r.index(pad)] if pad in r else r for r in found.tokens]
    batch = laid_out(prompts, responses, device, width)
    batch = batch._replace(
        logprobs=_of_slots(batch, [x[: len(r)] for x, r in zip(found.logprobs, responses, strict=True)]),
        values=_in_parts(self, batch, partial(_values, wrapper.value_model)),
    )
    if self.ref_model is None:
        with self.null_ref_context():
            ref_logprobs = _in_parts(self, batch, partial(_logprobs, policy, args))
    else:
        ref_logprobs = _in_parts(self, batch, partial(_logprobs, self.ref_model, args))
    scores = _in_parts(self, batch, partial(_scores, self.reward_model))
    eos = self.processing_class.eos_token_id
    ended = torch.tensor([len(r) < width if pad == eos else eos in r for r in responses], device=device)
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * ~ended
    batch = batch._replace(ref_logprobs=ref_logprobs * batch.sampled)
    batch, kl = _advantages(batch, scores, args)
    log = _objectives(batch, kl, scores, args, int(sum(x == eos for r in found.tokens for x in r)))
    return batch, log


def _of_slots(batch: Batch, rows: list[list[float]]) -> Tensor:
    """Numbers of response tokens at their slots, (N,) float32."""
    given = torch.tensor([x for row in rows for x in row], dtype=torch.float32, device=batch.states.device)
    return torch.zeros(len(batch.states), device=given.device).masked_scatter(batch.sampled, given)


def _in_parts(self: Any, batch: Batch, score: Any) -> Tensor:
    """`score` of some sequences at a time, as many as TRL takes."""
    count, size = len(batch.cu_seqlens) - 1, self.args.local_rollout_forward_batch_size
    return torch.cat([score(batch.rows(part)) for part in torch.arange(count, device=batch.tokens.device).split(size)])


def _logprobs(model: Any, args: Any, batch: Batch) -> Tensor:
    hidden = packed_hidden(plain(model), batch.tokens, batch.cu_seqlens)[batch.states]
    return head_logprobs(hidden, head_of(plain(model)), batch.labels, temperature=args.temperature + 1e-7)[0]


def _scores(model: Any, batch: Batch) -> Tensor:
    """The reward model at each sequence's last token, (S,) float32."""
    hidden = packed_hidden(model, batch.tokens, batch.cu_seqlens)[batch.cu_seqlens[1:].long() - 1]
    return model.score(hidden)[:, 0].float()  # type: ignore[no-any-return]


def _advantages(batch: Batch, scores: Tensor, args: Any) -> tuple[Batch, Tensor]:
    """With advantages and returns; and the KL at each slot."""
    kl = K.kl_penalty(batch.logprobs, batch.ref_logprobs, estimator=args.kl_estimator)
    rewards = -args.kl_coef * kl
    rewards[batch.slot_cu[1:].long() - 1] += scores
    if args.whiten_rewards:
        rewards = whitened(rewards, torch.ones_like(batch.sampled), keep_mean=True)
    advantages, returns = K.gae(rewards, batch.values, batch.slot_cu, gamma=args.gamma, lam=args.lam)
    white = whitened(advantages, batch.sampled)
    return batch._replace(advantages=white * batch.sampled, returns=returns), kl


def _objectives(batch: Batch, kl: Tensor, scores: Tensor, args: Any, eos_tokens: int) -> dict[str, float]:
    """The `objective/...` of TRL, read back together."""
    count = len(scores)
    penalty = -args.kl_coef * kl.sum() / count
    figures = torch.stack(
        [kl.sum() / count, -batch.logprobs.sum() / count, penalty, penalty + scores.mean(), scores.mean()]
    )
    names = ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")
    log = {f"objective/{name}": x for name, x in zip(names, figures.tolist(), strict=True)}
    return log | {"val/num_eos_tokens": float(eos_tokens)}


# ---- the loop -------------------------------------------------------------------------------------------------------


def train(self: Any) -> None:
    """TRL's loop: for each batch a rollout, then epochs of minibatches of micro-batches, its log and its callbacks."""
    args, accelerator = self.args, self.accelerator
    _check_sharding(self)
    began = time.time()
    _begin(self)
    batches = _endless(self.dataloader)
    for update in range(1, args.num_total_batches + 1):
        self.state.episode += args.batch_size
        batch, log = _collect(self, next(batches)["input_ids"].to(accelerator.device), update)
        figures = []
        for _ in range(args.num_ppo_epochs):
            order = np.random.permutation(args.local_batch_size)
            for start in range(0, args.local_batch_size, args.local_mini_batch_size):
                mini = order[start : start + args.local_mini_batch_size]
                for micro in np.split(
                    mini, range(args.per_device_train_batch_size, len(mini), args.per_device_train_batch_size)
                ):
                    which = torch.as_tensor(micro, device=accelerator.device)
                    with accelerator.accumulate(self.model):
                        losses = self.model(batch.rows(which), args)
                        accelerator.backward(losses.policy + args.vf_coef * losses.value)
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                    figures.append(torch.stack([losses.policy.detach(), losses.value.detach(), *losses.figures]))
        log.update(_figures(self, torch.stack(figures)))
        self.state.epoch = self.state.episode / self.train_dataset_len
        self.state.global_step += 1
        self.log({"eps": int(self.state.episode / (time.time() - began)), **log, "episode": self.state.episode})
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        _save_if_due(self)
        if args.num_sample_generations > 0 and (update - 1) % self.sample_generations_freq == 0:
            self.generate_completions(sampling=True)
    self.control = self.callback_handler.on_train_end(args, self.state, self.control)
    _save_if_due(self)


def _figures(self: Any, rows: Tensor) -> dict[str, float]:
    """Means over the update's micro-batches, and over the ranks."""
    means = self.accelerator.gather_for_metrics(rows.mean(0)[None]).mean(0).tolist()
    names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/ratio", "policy/approxkl_avg",
             "policy/entropy_avg", "val/clipfrac_avg")  # fmt: skip
    ratios = self.accelerator.gather_for_metrics(rows[:, 3])
    found = dict(zip(names, means, strict=True))
    return found | {"val/ratio_var": float(ratios.var()), "lr": self.lr_scheduler.get_last_lr()[0]}


def _begin(self: Any) -> None:
    args, state = self.args, self.state
    self.model.train()
    state.global_step, state.episode, state.max_steps = 0, 0, args.num_total_batches
    state.num_train_epochs = args.total_episodes / self.train_dataset_len
    for name in ("logging_steps", "eval_steps", "save_steps"):
        every = getattr(args, name)
        if every is not None:
            setattr(state, name, math.ceil(state.max_steps * every) if every < 1 else every)
    self.control = self.callback_handler.on_train_begin(args, state, self.control)
    if self.is_deepspeed_enabled:
        self.deepspeed = self.model_wrapped = self.model


def _save_if_due(self: Any) -> None:
    if self.control.should_save:
        self._save_checkpoint(self.model, trial=None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _check_sharding(self: Any) -> None:
    """Weights are read where they lie whole."""
    plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
    if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise IntegrationError(
            "the patched PPOTrainer reads weights that are whole on each rank, which FSDP's and ZeRO-3's are not; use "
            "DDP or ZeRO up to stage 2 here, or ppomax.integrations.trl.PPOTrainer, whose engine shards by ZeRO-3"
        )

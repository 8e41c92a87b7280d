"""Every knob of a PPO-max run and its default, each written once.

One frozen dataclass a concern; `TrainConfig` holds them. The defaults are the `ppo-max` preset at the size of the
shipped model. Presets and files are laid over them in layers.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ppomax.config.mapping import ConfigError, require

IMPLS = ("auto", "ref", "cpu", "triton", "cuda")


def _finite(value: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class ModelConfig:
    """The models of a run. Every path is an HF directory or hub name."""

    policy: str | None = None
    """Start weights of the policy (and of the reference unless that is named). None: the model that ships with
    ppomax."""
    reference: str | None = None
    """Frozen model that the KL penalty is measured against. None: the policy's start weights."""
    reward_model: str | None = None
    """Frozen sequence scorer. None: the shipped one if the policy is the shipped one too."""
    critic: str = "reward_model"
    """Start of the critic: `reward_model` (head included), `policy` (new small head), `trunk` (hydra only: a copy of
    the policy's trained layers on the shared trunk, new small head), or a path."""
    critic_train: Literal["full", "lora"] = "full"
    """What of the critic is trained. `full`: all weights of a model of its own. `lora`: adapters and the head, on the
    frozen weights of what it starts from, which are held once: the reward model's, or the policy's own where
    model.train is lora."""
    train: Literal["full", "lora", "hydra"] = "full"
    """What of the policy is trained. `full`: all weights, beside a whole reference model. `lora`: adapters; the
    reference is the policy with its adapters off. `hydra`: the top `trained_layers` blocks and the final norm;
    embeddings, head and lower blocks are frozen and run once for policy, reference and value branch."""
    trained_layers: int = 2
    """hydra: how many blocks, from the top, are trained."""
    lora_rank: int = 16
    """lora: rank of each adapter."""
    lora_alpha: float = 32.0
    """lora: an adapter's output is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] | None = None
    """lora: names of the linear layers of the blocks that get an adapter (q_proj, v_proj ...). None: all of them."""
    frozen_bits: Literal[4, 8] | None = None
    """Bits of the weights of frozen linear layers in the blocks: the policy's under adapters or in the trunk, a whole
    reference's, the reward model's, an adapted critic's. 8: int8 with a scale a row; 4: NF4. None: as `dtype` says.
    Decoding then makes each weight whole in each step, which costs more than reading it. A whole reference (train:
    full) is no longer the policy's start to the bit. Needs bitsandbytes, and models whole on each rank."""
    tokenizer: str | None = None
    """Tokenizer directory. None: the policy's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type of the trained models; logprobs, values and losses are float32 in any case."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """How scoring and update attend. `varlen`: over packed sequences, without padding, by torch's kernel on a CUDA
    device in bfloat16, by ours on a CPU in float32; `flash_attention_2` does the same where flash-attn is installed;
    the rest pad. auto: varlen where it serves, else as the model was loaded."""
    gradient_checkpointing: bool = False
    """Run each decoder block of policy and critic once more in the backward instead of keeping what its forward held:
    an update then holds one block's activations and every block's input, for a third more compute. Same gradients."""
    trust_remote_code: bool = False
    """Let a checkpoint run Python of its own. Off: such checkpoints are refused."""

    def __post_init__(self) -> None:
        require(self.trained_layers >= 1, "model.trained_layers", "at least 1", self.trained_layers)
        require(self.lora_rank >= 1, "model.lora_rank", "at least 1", self.lora_rank)
        require(_finite(self.lora_alpha) and self.lora_alpha > 0, "model.lora_alpha", "above 0", self.lora_alpha)
        require(
            self.lora_targets is None or len(self.lora_targets) > 0, "model.lora_targets", "names, or null for all", []
        )
        if self.critic == "trunk" and self.train != "hydra":
            raise ConfigError(
                f"config: model.critic=trunk stands on a frozen trunk, which model.train={self.train} has not; set "
                "model.train=hydra, or model.critic to reward_model, policy or a path"
            )
        if self.critic_train == "lora" and self.critic == "trunk":
            raise ConfigError(
                "config: model.critic=trunk is trained whole; set model.critic_train=full, or model.critic to "
                "reward_model, policy or a path"
            )
        if self.critic_train == "lora" and self.critic == "policy" and self.train != "lora":
            raise ConfigError(
                "config: model.critic=policy with model.critic_train=lora stands on the policy's frozen weights, but "
                f"model.train={self.train} trains them; set model.train=lora, or model.critic to reward_model or a path"
            )
        if self.reference is not None and self.train != "full":
            raise ConfigError(
                f"config: model.reference is set, but with model.train={self.train} the reference is the policy's own "
                "start; leave model.reference out, or set model.train=full"
            )


@dataclass(frozen=True)
class DataConfig:
    """Prompts, and the plain text of the ptx term."""

    prompts: str | None = None
    """JSONL, CSV, Parquet or HF dataset with a `prompt` column (string or chat), or dialogues whose last answer is left
    out; or a mixture of such. `default`, and None where the policy is the one that ships: the prompts that ship with
    ppomax."""
    eval_prompts: str | None = None
    """Held-out prompts, for sample texts and evaluations; `default`: those that ship. None: those that ship where
    `prompts` are, too; else there are none, and the first of `prompts` stand in."""
    prompt_column: str = "prompt"
    """Column that holds the prompt."""
    max_prompt_tokens: int = 512
    """A longer prompt is refused by `overlong`."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """Prompts over the limit: stop with an error, keep their last tokens, or leave them out; each is counted and
    logged."""

    def __post_init__(self) -> None:
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", "at least 1", self.max_prompt_tokens)


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    max_new_tokens: int = 48
    """Response limit in tokens, EOS included; a response cut here is `truncated`."""
    min_new_tokens: int = 0
    """EOS is forbidden before this many tokens are out; 0 allows an empty response (EOS alone)."""
    temperature: float = 1.0
    """Sampling temperature. Scoring and training divide logits by the same number, so ratio and KL are those of one
    distribution."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all. As for top_p and min_new_tokens, training records what each token was
    drawn from, and scores, ratio, KL and entropy are over these tokens: 4 * top_k bytes a token up to 64, else an
    eighth of the vocabulary."""
    top_p: float = 1.0
    """Sample from the smallest set with this mass; 1: all."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that the response holds already by this where they are above 0, multiply where below;
    1: off. Scoring does not know of it: needs allow_biased_sampling."""
    allow_biased_sampling: bool = False
    """Score over the whole vocabulary what was sampled with top_k, top_p, min_new_tokens or a repetition penalty, as
    most trainers do: nothing is recorded, and ratios and KL are not those of the sampling distribution."""
    samples_per_prompt: int = 1
    """Responses drawn for each prompt."""
    slots: int = 128
    """Sequences decoded together; one that ends gives its slot to the next. The tokens do not depend on it."""
    cache_tokens: int | None = None
    """Most tokens that the KV cache holds. None: what `slots` sequences of the longest kind need. Below that, sequences
    take room as they grow and wait for it; where the mean response is half the limit, half the tokens serve as well.
    What is drawn does not depend on it."""
    exact: bool | None = None
    """Record while decoding the logprobs and entropies that scoring would give, to the bit, and do not score the policy
    again. On a CPU in float32, for models of linear layers, RMS norms, SwiGLU and rotary embeddings (Llama, Qwen,
    Mistral); attention of scoring and update is then `varlen`. null: where the model, tried at the start, allows
    it."""
    sampler: Literal["builtin", "vllm"] = "builtin"
    """Who draws. `vllm`: vLLM in a process of its own beside each rank, on the same device, handed the weights before
    each rollout; scores, ratio and KL stay those of the training forward. Give loss.sampler_is_cap with it."""
    ahead: Literal[0, 1] = 0
    """1: the sampler draws the next buffer while the models train on this one, with the weights of before that update.
    Needs a sampler of its own, and loss.sampler_is_cap, which weighs tokens by how far the policy has moved since."""
    sampler_timeout: float = 600.0
    """Seconds that it may take to start, to take the weights, or to draw a buffer."""
    sampler_memory: float = 0.3
    """Share of the GPU's memory that it may take while it draws; between rollouts it sleeps."""
    cuda_graphs: bool | None = None
    """Replay decoding steps from CUDA graphs, with their rows rounded up. None: on a CUDA device; true is an error
    elsewhere."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1", self.max_new_tokens)
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "rollout.min_new_tokens",
            f"in [0, max_new_tokens={self.max_new_tokens}]",
            self.min_new_tokens,
        )
        require(_finite(self.temperature) and self.temperature > 0, "rollout.temperature", "above 0", self.temperature)
        require(self.top_k >= 0, "rollout.top_k", "0 (off) or more", self.top_k)
        require(0 < self.top_p <= 1, "rollout.top_p", "in (0, 1]", self.top_p)
        penalty = self.repetition_penalty
        require(_finite(penalty) and penalty > 0, "rollout.repetition_penalty", "above 0 (1: off)", penalty)
        require(
            penalty == 1 or self.allow_biased_sampling,
            "rollout.repetition_penalty",
            "1, or beside rollout.allow_biased_sampling: true, since ratio and KL leave it out (loss.sampler_is_cap "
            "weighs tokens by what the sampler gave them)",
            penalty,
        )
        require(self.sampler_timeout > 0, "rollout.sampler_timeout", "above 0 seconds", self.sampler_timeout)
        require(0 < self.sampler_memory <= 1, "rollout.sampler_memory", "in (0, 1]", self.sampler_memory)
        require(
            self.sampler == "builtin" or not self.records_cut,
            "rollout.sampler",
            "builtin with top_k, top_p or min_new_tokens, whose sets only it records; or set "
            "rollout.allow_biased_sampling: true",
            self.sampler,
        )
        sorts = "another sampler, or top_k, top_p or min_new_tokens without rollout.allow_biased_sampling: true"
        require(not self.exact or not self.apart, "rollout.exact", f"false or null with {sorts}", self.exact)
        require(
            self.sampler == "builtin" or penalty == 1,
            "rollout.repetition_penalty",
            "1 with rollout.sampler: vllm, which penalises the prompt's tokens too",
            penalty,
        )
        require(self.samples_per_prompt >= 1, "rollout.samples_per_prompt", "at least 1", self.samples_per_prompt)
        require(self.slots >= 1, "rollout.slots", "at least 1", self.slots)
        require(
            self.cache_tokens is None or self.cache_tokens >= 1,
            "rollout.cache_tokens",
            "at least 1, or null for what the slots need",
            self.cache_tokens,
        )

    @property
    def records_cut(self) -> bool:
        """Whether what each token was drawn from is recorded, and scored over."""
        cut = self.top_k > 0 or self.top_p < 1 or self.min_new_tokens > 0
        return cut and not self.allow_biased_sampling

    @property
    def apart(self) -> bool:
        """Whether tokens are drawn otherwise than from the policy's whole distribution by our decoder."""
        return self.sampler != "builtin" or self.records_cut


@dataclass(frozen=True)
class RewardConfig:
    """From a response's raw score to the score that PPO sees: standardise, clip, subtract the missing-EOS penalty."""

    function: str | None = None
    """Python reward instead of the reward model: `file.py:name` or `package.module:name`, called as
    f(prompts: list[str], responses: list[str]) -> one number each, or a list of one for each of its tokens. By keyword
    it gets what its further arguments name of the prompts' columns, and of `prompt_ids`, `response_ids` and `finished`;
    with `**columns` all of it."""
    functions: tuple[str, ...] = ()
    """Several Python rewards, `WEIGHT*file.py:name` each: their scores times their weights are added, to the reward
    model's (times `model_weight`) if there is one. In place of `function`."""
    tokenizer: str | None = None
    """Tokenizer of a reward model that does not share the policy's: it then gets text, the response as an assistant's
    turn after the prompt where that tokenizer has a chat template. None: it reads the policy's tokens."""
    model_weight: float = 1.0
    """Weight of the reward model's score beside `functions`. 0: it is not asked (nor loaded)."""
    workers: int = 0
    """Processes that a Python reward runs in, each on a share of the responses. 0: in this one."""
    timeout: float | None = None
    """Seconds that a Python reward may take for a buffer; it must be async, or have `workers`. None: any time."""
    standardize: Literal["norm", "scale", "return", "none"] = "norm"
    """`norm`: (score - running mean) / running std; `scale`: score / running std; `return`: score / running std of the
    discounted sum that rolls over a response's tokens, R = gamma * R + r (Engstrom et al., arXiv 2005.12729); `none`.
    Moments over the whole history, this batch included."""
    clip: float | None = 10.0
    """Standardised scores are cut to +-clip; the KL penalty is added after. None: off. 0 would erase every reward and
    is refused."""
    missing_eos_penalty: float | None = 1.0
    """Subtracted after clipping (so in standard deviations when standardised) from responses that did not end by EOS.
    None or 0: off."""

    def __post_init__(self) -> None:
        require(
            self.clip is None or (_finite(self.clip) and self.clip > 0),
            "reward.clip",
            "above 0, or null for no clipping (0 would erase every reward)",
            self.clip,
        )
        require(
            not (self.function and self.functions), "reward.function", "null beside reward.functions", self.function
        )
        for spec in self.functions:
            require(_weighed(spec) is not None, "reward.functions", "WEIGHT*file.py:name each", spec)
        require(_finite(self.model_weight), "reward.model_weight", "finite", self.model_weight)
        require(self.workers >= 0, "reward.workers", "0 (off) or more", self.workers)
        require(self.timeout is None or self.timeout > 0, "reward.timeout", "above 0, or null", self.timeout)
        penalty = self.missing_eos_penalty
        require(
            penalty is None or (_finite(penalty) and penalty >= 0),
            "reward.missing_eos_penalty",
            "0 or more, or null",
            self.missing_eos_penalty,
        )

    @property
    def terms(self) -> list[tuple[float, str]]:
        """(weight, `file.py:name`) of each Python reward."""
        return [(1.0, self.function)] if self.function else [w for s in self.functions if (w := _weighed(s))]

    @property
    def uses_model(self) -> bool:
        """Whether a reward model scores, alone or beside functions."""
        return self.function is None and (self.model_weight != 0 or not self.functions)


def _weighed(spec: str) -> tuple[float, str] | None:
    """`0.5*file.py:name` -> (0.5, "file.py:name"); None: it is not of that form."""
    weight, star, name = spec.partition("*")
    try:
        return (float(weight), name) if star and name and math.isfinite(float(weight)) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class KLConfig:
    """The tie to the reference model."""

    coef: float = 0.05
    """Weight of the token-level KL penalty inside the reward, per nat. 0: off."""
    estimator: Literal["k1", "k2", "k3", "abs", "vocabulary"] = "k1"
    """Per-token estimate inside the reward, from the drawn token's logprobs. k1 is unbiased there. `vocabulary`: the
    divergence itself, summed over all tokens at each state; a second pass through both heads."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive`: coef *= 1 + clip(KL/target - 1, -0.2, 0.2) * sequences / horizon after each step (Ziegler et al.)."""
    target: float = 0.05
    """Adaptive controller's goal: mean KL per token, nats."""
    horizon: int = 2000
    """Adaptive controller's pace, in sequences."""
    loss_coef: float = 0.0
    """Weight of a differentiable KL term in the policy loss, in place of or beside the penalty in the reward. 0:
    off."""
    loss_estimator: Literal["k1", "k2", "k3", "abs"] = "k2"
    """Estimate of the loss term. k2 has the right gradient there."""
    refresh_every: int | None = None
    """After so many steps the policy as it is then becomes the reference, again and again; checkpoints hold it. None:
    the reference stays the start."""

    def __post_init__(self) -> None:
        require(_finite(self.coef) and self.coef >= 0, "kl.coef", "0 or more", self.coef)
        require(_finite(self.loss_coef) and self.loss_coef >= 0, "kl.loss_coef", "0 or more", self.loss_coef)
        require(_finite(self.target) and self.target > 0, "kl.target", "above 0", self.target)
        require(self.horizon >= 1, "kl.horizon", "at least 1", self.horizon)
        every = self.refresh_every
        require(every is None or every >= 1, "kl.refresh_every", "at least 1 step, or null for never", every)

    def refreshes_after(self, step: int) -> bool:
        """Whether the policy becomes the reference after this step, from 1."""
        return self.refresh_every is not None and step % self.refresh_every == 0


@dataclass(frozen=True)
class AdvantageConfig:
    """Generalised advantage estimation, actor and critic apart."""

    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE lambda of the actor's advantages."""
    critic_lam: float | None = None
    """GAE lambda of the critic's targets; 1 gives Monte-Carlo returns. None: the actor's `lam`."""
    length_alpha: float | None = None
    """Length-adaptive actor lambda 1 - 1/(alpha * length) (VAPO uses 0.05), at least 0. None: `lam` for all lengths."""
    whiten: bool = False
    """Normalise advantages to mean 0 and std 1."""
    clip: float | None = None
    """Cut advantages to +-clip, after whitening. None: off."""
    bootstrap_truncated: bool = False
    """A response that was cut at the limit goes on after it: the critic's value at its last token, times gamma, stands
    for the rewards to come. Off: they count as none."""
    over: Literal["buffer", "minibatch"] = "buffer"
    """Whose mean and std `whiten` takes: the whole buffer's, or each minibatch's own."""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "advantage.gamma", "in [0, 1]", self.gamma)
        require(0 <= self.lam <= 1, "advantage.lam", "in [0, 1]", self.lam)
        require(
            self.critic_lam is None or 0 <= self.critic_lam <= 1,
            "advantage.critic_lam",
            "in [0, 1] or null",
            self.critic_lam,
        )
        require(
            self.length_alpha is None or self.length_alpha > 0,
            "advantage.length_alpha",
            "above 0 or null",
            self.length_alpha,
        )
        require(self.clip is None or self.clip > 0, "advantage.clip", "above 0 or null", self.clip)


@dataclass(frozen=True)
class LossConfig:
    """Policy and value losses. All means are over the tokens of the global minibatch."""

    clip_low: float | None = 0.2
    """Ratios below 1 - clip_low stop counting when the advantage is negative. None: off."""
    clip_high: float | None = 0.2
    """Ratios above 1 + clip_high stop counting when the advantage is positive (0.28 is clip-higher). None: off."""
    ratio_to: Literal["buffer", "reference"] = "buffer"
    """Policy that the ratio is taken against: the one that made the buffer, or the reference (what the paper calls
    importance sampling; the first ratio is then not 1)."""
    dual_clip: float | None = None
    """Bound ratio * advantage at dual_clip * advantage for negative advantages (3 in its paper). None: off."""
    value_clip: float | None = 0.2
    """Absolute range around the old value that a new value may move within. None: off."""
    vf_coef: float = 1.0
    """Weight of the value loss (which has a factor 1/2 inside)."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus, per nat. 0: off."""
    ent_target: float | None = None
    """Entropy in nats a token that `ent_coef` pulls to: its term is then ent_coef * |H - ent_target|, with H a
    minibatch's mean, its side of the target taken as the buffer was scored. None: the plain bonus -ent_coef * H."""
    joint_grad_clip: bool = False
    """Hold the norm of both models' gradients together against each model's `grad_clip`, as one optimiser over both
    would, so that a large gradient of the critic shrinks the policy's step. Not under ZeRO 1 to 3, where DeepSpeed
    clips each by itself."""
    sampler_is_cap: float | None = None
    """Truncated importance weight min(pi_train / pi_sampler, cap) for samplers whose logprobs differ from the
    trainer's. None: off."""

    def __post_init__(self) -> None:
        low, high = self.clip_low, self.clip_high
        require(low is None or 0 < low < 1, "loss.clip_low", "in (0, 1), or null for off", low)
        require(high is None or high > 0, "loss.clip_high", "above 0, or null for off", high)
        require(self.dual_clip is None or self.dual_clip > 1, "loss.dual_clip", "above 1 or null", self.dual_clip)
        require(self.value_clip is None or self.value_clip > 0, "loss.value_clip", "above 0 or null", self.value_clip)
        require(_finite(self.vf_coef) and self.vf_coef > 0, "loss.vf_coef", "above 0", self.vf_coef)
        require(_finite(self.ent_coef), "loss.ent_coef", "finite", self.ent_coef)
        target = self.ent_target
        require(target is None or (_finite(target) and target >= 0), "loss.ent_target", "0 or more, or null", target)
        require(target is None or self.ent_coef > 0, "loss.ent_coef", "above 0 with loss.ent_target", self.ent_coef)
        require(
            self.sampler_is_cap is None or self.sampler_is_cap >= 1,
            "loss.sampler_is_cap",
            "1 or more, or null",
            self.sampler_is_cap,
        )


@dataclass(frozen=True)
class CriticConfig:
    """Critic pre-training: the policy frozen, the critic regressed on Monte-Carlo returns before PPO starts."""

    pretrain_steps: int = 4
    """Most buffers to pre-train on. 0: off."""
    pretrain_epochs: int = 2
    """Passes over each of those buffers."""
    pretrain_lr: float | None = None
    """Constant learning rate of this stage. None: the critic's own peak."""
    pretrain_explained_variance: float = 0.5
    """Stop once a fresh buffer's returns are explained this well, 1 - Var(G - V)/Var(G), before training on it."""

    def __post_init__(self) -> None:
        require(self.pretrain_steps >= 0, "critic.pretrain_steps", "0 (off) or more", self.pretrain_steps)
        require(self.pretrain_epochs >= 1, "critic.pretrain_epochs", "at least 1", self.pretrain_epochs)
        require(
            self.pretrain_lr is None or self.pretrain_lr > 0, "critic.pretrain_lr", "above 0 or null", self.pretrain_lr
        )
        require(
            self.pretrain_explained_variance <= 1,
            "critic.pretrain_explained_variance",
            "1 or less",
            self.pretrain_explained_variance,
        )


@dataclass(frozen=True)
class PtxConfig:
    """Language-model loss mixed into the policy's, in the same backward and the same optimiser step."""

    coef: float = 0.1
    """Weight of the mean token NLL. 0: off."""
    texts: str | None = None
    """JSONL, CSV, Parquet or HF dataset with a `text` column (or `prompt`/`response`). None: responses of the start
    policy to the run's own prompts, sampled once."""
    pool: int = 256
    """How many responses are sampled when `texts` is not given."""
    batch_size: int = 8
    """Texts beside each minibatch."""
    max_tokens: int = 128
    """Longer texts are cut here."""

    def __post_init__(self) -> None:
        require(_finite(self.coef) and self.coef >= 0, "ptx.coef", "0 (off) or more", self.coef)
        require(self.pool >= 1, "ptx.pool", "at least 1", self.pool)
        require(self.batch_size >= 1, "ptx.batch_size", "at least 1", self.batch_size)
        require(self.max_tokens >= 2, "ptx.max_tokens", "at least 2", self.max_tokens)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, for one of the two trained models."""

    lr: float = 1.05e-4
    """Peak learning rate. The paper's 5e-7 (policy) and 1.65e-6 (critic) are for 7B models."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip: float | None = 1.0
    """Largest global norm of this model's gradient. None: off."""
    warmup: float = 0.1
    """Linear warm-up, as a fraction of all optimiser steps."""
    schedule: Literal["inverse_sqrt", "constant", "linear", "cosine"] = "inverse_sqrt"
    """After a warm-up of W steps: sqrt(W/s), flat, down to `min_ratio` by a line, or by a cosine. Without a warm-up the
    first decays as after one of a tenth of the run, from the full rate."""
    min_ratio: float = 0.1
    """Least multiple of `lr`: where warm-up starts and where `linear` and `cosine` end."""

    def __post_init__(self) -> None:
        require(_finite(self.lr) and self.lr >= 0, "optim lr", "0 or more", self.lr)
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim betas",
            "two numbers in [0, 1)",
            self.betas,
        )
        require(self.eps > 0, "optim eps", "above 0", self.eps)
        require(self.weight_decay >= 0, "optim weight_decay", "0 or more", self.weight_decay)
        require(
            self.grad_clip is None or self.grad_clip > 0, "optim grad_clip", "above 0, or null for off", self.grad_clip
        )
        require(0 <= self.warmup <= 1, "optim warmup", "a fraction in [0, 1]", self.warmup)
        require(0 <= self.min_ratio <= 1, "optim min_ratio", "in [0, 1]", self.min_ratio)


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of the buffer and of what is cut from it. Counts are global, over all ranks."""

    rollout_size: int = 128
    """Sequences in the buffer: generated, then used up, each step."""
    minibatch_size: int = 32
    """Sequences behind one optimiser step."""
    epochs: int = 1
    """Passes over the buffer."""
    kl_stop: float | None = None
    """End a buffer's passes once the last one's mean KL to the policy that made it (nats a token) is above this. None:
    off."""
    micro_tokens: int = 4096
    """Most tokens, prompts included, in one forward and backward. The result does not depend on it; memory does."""

    def __post_init__(self) -> None:
        require(self.rollout_size >= 1, "batch.rollout_size", "at least 1", self.rollout_size)
        require(
            1 <= self.minibatch_size <= self.rollout_size,
            "batch.minibatch_size",
            f"in [1, rollout_size={self.rollout_size}]",
            self.minibatch_size,
        )
        require(self.epochs >= 1, "batch.epochs", "at least 1", self.epochs)
        require(self.kl_stop is None or self.kl_stop > 0, "batch.kl_stop", "above 0, or null for off", self.kl_stop)
        require(self.micro_tokens >= 1, "batch.micro_tokens", "at least 1", self.micro_tokens)


@dataclass(frozen=True)
class RunConfig:
    """How long, where, and what is kept."""

    steps: int = 50
    """Rollout-update iterations, critic pre-training not counted."""
    seed: int = 0
    """Seeds prompt order, sampling streams, minibatch order and new weights."""
    out: str | None = None
    """Folder of the run. None: a dated one under runs/."""
    resume: bool = False
    """Go on from the newest whole checkpoint in `out`."""
    checkpoint_every: int = 20
    """Steps between checkpoints; one is always written at the end. 0: only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    background_saves: bool | None = None
    """Write checkpoints while training goes on, from a copy of each rank's share in its host's memory. None: on GPUs,
    unless the optimiser is on the host already."""
    grace: float | None = None
    """Seconds that a scheduler leaves between its signal (or the file `stop` in the run's folder) and the kill. A step
    whose update and checkpoint would not be done by then is given up before its update, and drawn anew by the run that
    goes on. None: a step under way is always ended."""
    max_bad_steps: int = 5
    """Optimiser steps in a row that may be skipped for a NaN or infinite loss or gradient before the run stops."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`."""
    threads: int = 0
    """CPU threads of torch. 0: leave as it is."""
    ignore_plan: bool = False
    """Start although `ppomax plan` says that the run does not fit the memory that is there."""

    accept_changes: bool = False
    """Resume although prompts, texts or frozen weights are other ones than the run was begun with."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "run.steps", "at least 1", self.steps)
        require(self.seed >= 0, "run.seed", "0 or more", self.seed)
        require(self.grace is None or self.grace > 0, "run.grace", "above 0 seconds, or null", self.grace)
        require(self.checkpoint_every >= 0, "run.checkpoint_every", "0 or more", self.checkpoint_every)
        require(self.keep_checkpoints >= 1, "run.keep_checkpoints", "at least 1", self.keep_checkpoints)
        require(self.max_bad_steps >= 1, "run.max_bad_steps", "at least 1", self.max_bad_steps)
        require(self.threads >= 0, "run.threads", "0 or more", self.threads)


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched."""

    samples_every: int = 10
    """Steps between sample texts of the fixed prompts. 0: none."""
    sample_prompts: int = 8
    """How many fixed prompts."""
    eval_every: int = 0
    """Steps between evaluations on held-out prompts: win rate over the start policy. Before the first step and after
    the last one there is one in any case where there are such prompts. 0: no others."""
    eval_prompts: int = 128
    """How many of them. 0: no evaluation."""
    eval_judge: str | None = None
    """Who compares: `reward`, the training's own; `classifier`, the shipped one of film reviews; or a function
    `file.py:name` as `reward.function`. None: the classifier on held-out prompts that ship, else `reward`."""
    tensorboard: bool = True
    """Write TensorBoard events too."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Services that get the metrics as well, each a package of its own to install. One that cannot be used is dropped
    with a warning, and the run goes on."""
    alarm: Literal["off", "warn", "stop", "rollback"] = "warn"
    """What a collapse alarm does."""
    alarm_baseline_steps: int = 10
    """First steps, whose means are the healthy state, as long as their KL is small."""
    alarm_window: int = 5
    """Steps of the moving mean that is held against it."""
    alarm_kl: float = 0.3
    """KL per token (k3, nats) that counts as one sign of collapse; so does its doubling in 50 steps above half of this.
    Four times this raises the alarm by itself. `python -m bench.lab alarm` shows what it was chosen by."""
    alarm_truncated: float = 0.3
    """Rise of the truncated share that counts as one sign; so does a mean length of twice or half the start's."""
    alarm_entropy: float = 0.6
    """Entropy or NLL below this multiple of the start's counts as one sign; the fourth is a perplexity under the start
    model of three times or a third of its first. Two of the four raise the alarm."""

    def __post_init__(self) -> None:
        require(self.samples_every >= 0, "monitor.samples_every", "0 or more", self.samples_every)
        require(self.sample_prompts >= 1, "monitor.sample_prompts", "at least 1", self.sample_prompts)
        require(self.eval_every >= 0, "monitor.eval_every", "0 or more", self.eval_every)
        require(self.eval_prompts >= 0, "monitor.eval_prompts", "0 (off) or more", self.eval_prompts)
        require(self.alarm_baseline_steps >= 1, "monitor.alarm_baseline_steps", "at least 1", self.alarm_baseline_steps)
        require(self.alarm_window >= 1, "monitor.alarm_window", "at least 1", self.alarm_window)


@dataclass(frozen=True)
class ShardingConfig:
    """How models are cut over the ranks that torchrun or deepspeed started. Plain torch in one process."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO: 0 nothing is cut (data parallel), 1 optimiser state, 2 gradients too, 3 weights too. None: plain
    torch in one process, 2 in several."""
    offload_optimizer: bool = False
    """Optimiser state and float32 weights on the host, which also steps them. Needs zero_stage 1, 2 or 3."""
    offload_param: bool = False
    """Weights on the host, fetched layer by layer. Needs zero_stage 3."""
    frozen: Literal["auto", "whole", "sharded", "offloaded"] = "auto"
    """Reference and reward model: `whole` on every rank, cut over the ranks as by ZeRO-3, or so on the host. `auto`:
    sharded under zero_stage 3, else whole."""
    idle: Literal["device", "host"] = "device"
    """Where reference, reward model and critic (with its optimiser) lie while a phase does without them: sampling needs
    none of the three, scoring not the reward model, an update the critic alone. `host`: pinned memory, from which they
    are copied whole. Of whole models, as in one process or under zero_stage 0; parts have `frozen: offloaded` and
    `offload_param`."""
    hpz: int = 1
    """ZeRO++ hpZ: ranks (of one node) that hold a second copy of the weights among them. 1: off. Needs zero_stage 3,
    and a number that divides that of the ranks."""
    quantized_weights: bool = False
    """ZeRO++ qwZ: gather weights in int8. Faster over slow links, not exact. Needs zero_stage 3 and GPUs: DeepSpeed has
    no such kernel for CPUs, so that, unlike all else here, no test runs it."""
    deepspeed: str | None = None
    """JSON or YAML file of further DeepSpeed settings; what contradicts a knob of ours is refused."""
    timeout: float = 3600.0
    """Seconds that a rank may wait for another's work in one exchange."""
    silence: float = 40.0
    """Seconds without a sign of life after which a rank counts as dead and the job ends; on one host a rank whose
    process is gone is noticed at once. 0: however long it is silent."""

    def __post_init__(self) -> None:
        stage = self.zero_stage
        require(stage in (None, 0, 1, 2, 3), "sharding.zero_stage", "0, 1, 2, 3 or null", stage)
        require(
            not self.offload_optimizer or stage in (1, 2, 3),
            "sharding.zero_stage",
            "1, 2 or 3 when sharding.offload_optimizer is on",
            stage,
        )
        for knob, on in (
            ("offload_param", self.offload_param),
            ("hpz", self.hpz > 1),
            ("quantized_weights", self.quantized_weights),
        ):
            require(not on or stage == 3, "sharding.zero_stage", f"3 when sharding.{knob} is on", stage)
        require(self.hpz >= 1, "sharding.hpz", "1 (off) or more", self.hpz)
        require(
            self.deepspeed is None or stage in (1, 2, 3),
            "sharding.zero_stage",
            "1, 2 or 3 when sharding.deepspeed names a file",
            stage,
        )
        require(self.timeout > 0, "sharding.timeout", "above 0", self.timeout)
        require(self.silence == 0 or self.silence >= 10, "sharding.silence", "0 (off), or at least 10", self.silence)


@dataclass(frozen=True)
class TrainConfig:
    """One PPO-max run."""

    preset: str = "ppo-max"
    """Name of the preset that this configuration started from."""
    impl: str = "auto"
    """Back-end of every kernel: auto, ref (plain torch), cpu, triton or cuda."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    policy_optim: OptimConfig = field(default_factory=OptimConfig)
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    run: RunConfig = field(default_factory=RunConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    def __post_init__(self) -> None:
        require(self.impl in IMPLS, "impl", f"one of {', '.join(IMPLS)}", self.impl)
        require(
            self.batch.rollout_size % self.rollout.samples_per_prompt == 0,
            "batch.rollout_size",
            f"a multiple of rollout.samples_per_prompt={self.rollout.samples_per_prompt}",
            self.batch.rollout_size,
        )
        if self.reward.tokenizer is not None and self.model.critic == "reward_model":
            raise ConfigError(
                "config: reward.tokenizer gives the reward model a vocabulary of its own, and a critic reads the "
                "policy's tokens; set model.critic to policy, or to a path"
            )
        if self.rollout.ahead and (self.loss.sampler_is_cap is None or self.run.grace is not None):
            raise ConfigError(
                "config: rollout.ahead=1 trains on responses of the policy before the last update: set "
                "loss.sampler_is_cap (2, say), and leave run.grace null"
            )
        if self.model.frozen_bits is not None:
            whole = self.sharding.zero_stage != 3 and self.sharding.frozen in ("auto", "whole")
            cut = "null where sharding.zero_stage=3 or sharding.frozen cuts models over the ranks"
            require(whole, "model.frozen_bits", cut, self.model.frozen_bits)
            copied = self.kl.refresh_every is not None and self.model.train == "full"
            require(not copied, "model.frozen_bits", "null with kl.refresh_every", self.model.frozen_bits)
        if self.rollout.exact and self.why_not_exact:
            raise ConfigError(f"config: rollout.exact {self.why_not_exact}; change these, or leave it off")
        if self.kl.refresh_every is not None and self.model.train == "lora":
            raise ConfigError(
                "config: kl.refresh_every is set, but with model.train=lora the reference is the frozen weights under "
                "the adapters, which the policy has too; set model.train to full or hydra, or leave it off"
            )
        if self.advantage.bootstrap_truncated and self.model.critic == "trunk":
            raise ConfigError(
                "config: advantage.bootstrap_truncated needs the value at each response's last token, whose trunk "
                "states model.critic=trunk has not; set model.critic to reward_model, policy or a path, or leave it off"
            )

    @property
    def why_not_exact(self) -> str:
        """Why no rollout of this configuration is exact, whatever the model; empty if one may be."""
        serves = self.model.dtype == "float32" and self.model.train != "lora" and self.sharding.zero_stage != 3
        own = self.impl in ("auto", "cpu") and self.model.attention in ("auto", "varlen")
        if self.rollout.apart:
            return "needs sampler=builtin, and no top_k, top_p or min_new_tokens without allow_biased_sampling"
        if serves and own:
            return ""
        return (
            "needs model.dtype=float32, model.train=full or hydra, model.attention=auto or varlen, impl=auto or cpu, "
            "and no sharding.zero_stage=3"
        )

    @property
    def attention(self) -> str:
        """How policy and reference attend in scoring and update."""
        return "varlen" if self.rollout.exact else self.model.attention

    @property
    def optimizer_steps(self) -> int:
        """Of each model over the whole run, which the learning-rate schedules span."""
        return self.run.steps * self.batch.epochs * -(-self.batch.rollout_size // self.batch.minibatch_size)

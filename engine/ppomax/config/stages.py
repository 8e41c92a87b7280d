"""Knobs of the commands besides `train`, apart from their code, so that reading flags and `--help` load no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ppomax.config.knobs import OptimConfig, RunConfig, ShardingConfig
from ppomax.config.mapping import ConfigError, require, require_sampling


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """What fine-tuning and the reward model have in common: the model's form, the batch, the ranks."""

    tokenizer: str | None = None
    """Tokenizer directory; a reward model's must be the policy's, unless `train` is told of it. None: the model's
    own."""
    train: Literal["full", "lora"] = "full"
    """What is trained: all weights; or adapters (and a reward model's new score head), merged into what is written."""
    lora_rank: int = 16
    """lora: rank of each adapter."""
    lora_alpha: float = 32.0
    """lora: an adapter's output is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] | None = None
    """lora: names of the linear layers of the blocks that get an adapter (q_proj, v_proj ...). None: all of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type; the optimiser steps float32 weights, and losses are float32, in any case."""
    autocast: bool = False
    """With dtype float32: run matrix products in bfloat16."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """How attention is computed; `varlen` (on a GPU in bfloat16, on a CPU in float32) and `flash_attention_2` read
    packed sequences without padding. auto: varlen where it serves, else sdpa. For short rows in bfloat16 on a CPU
    `eager` is the fastest."""
    gradient_checkpointing: bool = False
    """Run each decoder block once more in the backward instead of keeping what its forward held."""
    impl: Literal["auto", "ref", "cpu", "triton", "cuda"] = "auto"
    """Back-end of the loss kernels."""
    max_tokens: int = 512
    """Limit of one row in tokens, prompt and EOS included; of a pair, of either side."""
    batch_tokens: int = 16384
    """Most tokens behind one optimiser step, over all ranks; of a pair both sides count."""
    micro_tokens: int = 16384
    """Most tokens of one forward and backward; a rank whose share of the batch is larger makes several."""
    epochs: float | None = None
    """Passes over the rows, which then say how many steps there are. None: `run.steps`."""
    eval_every: int = 100
    """Steps between held-out evaluations."""
    log_every: int = 10
    """Steps between rows of metrics."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Services that get the metrics as well, each a package of its own to install. One that cannot be used is dropped
    with a warning, and the run goes on."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    def __post_init__(self) -> None:
        require(self.max_tokens >= 2, "max_tokens", "at least 2", self.max_tokens)
        require(self.batch_tokens >= 1, "batch_tokens", "at least 1", self.batch_tokens)
        require(self.micro_tokens >= 1, "micro_tokens", "at least 1", self.micro_tokens)
        require(self.eval_every >= 1, "eval_every", "at least 1", self.eval_every)
        require(self.log_every >= 1, "log_every", "at least 1", self.log_every)
        require(self.epochs is None or self.epochs > 0, "epochs", "above 0, or null for run.steps", self.epochs)
        require(self.lora_rank >= 1, "lora_rank", "at least 1", self.lora_rank)
        require(self.lora_alpha > 0, "lora_alpha", "above 0", self.lora_alpha)
        require(self.lora_targets is None or bool(self.lora_targets), "lora_targets", "names, or null for all", [])
        require(not (self.autocast and self.dtype != "float32"), "autocast", "off unless dtype is float32", True)


@dataclass(frozen=True)
class SftConfig(SupervisedConfig):
    """One run of supervised fine-tuning or language modelling."""

    model: str
    """Start weights: HF directory or hub name of a causal language model; `default`: the one that ships with ppomax."""
    data: str
    """Training rows: JSONL, CSV, Parquet or HF data set with `text`, `prompt` + `response`, `messages`,
    `conversations`, or `chosen` of preference pairs."""
    eval_data: str | None = None
    """Held-out rows of the same form. None: no held-out figures."""
    mask_prompt: bool = True
    """Count the loss on responses only. Plain text has no prompt, so all of it counts."""
    overlong: Literal["error", "truncate", "split", "drop"] = "error"
    """Rows over the limit: stop with an error, cut the end, cut into several (plain text), or leave out; counted and
    logged."""
    bad_rows: Literal["error", "drop"] = "error"
    """Other unusable rows (empty, malformed): stop with an error, or leave out, counted and logged."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, schedule="cosine", weight_decay=0.1))
    run: RunConfig = field(default_factory=lambda: RunConfig(steps=1000))


@dataclass(frozen=True)
class RewardModelConfig(SupervisedConfig):
    """One run of reward-model training."""

    model: str
    """Start weights: a causal language model (its trunk, with a new score head) or an earlier reward model; `default`:
    the policy that ships with ppomax."""
    data: str
    """Training pairs: JSONL, CSV, Parquet or HF data set with `chosen` / `rejected` (and `prompt`, `margin`)."""
    eval_data: str | None = None
    """Held-out pairs. None: no held-out figures."""
    layers: int | None = None
    """Keep only the first so many blocks of the start model's trunk. None: all."""
    bad_rows: Literal["error", "drop"] = "drop"
    """Unusable pairs (equal sides, empty, over the limit): stop with an error, or leave out, counted and logged."""
    margin: float = 0.0
    """Added to each row's own `margin`, in score units."""
    lm_coef: float = 1.0
    """Weight of the language-model loss on chosen responses (the paper's beta_rm = 1). 0: off."""
    centre_data: str | None = None
    """Responses (`prompt` + `response`, or `text`) that shall score mean 0 after training. None: no centring."""
    unit_std: bool = False
    """Scale scores too, so that those responses have standard deviation 1."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-6))
    run: RunConfig = field(default_factory=lambda: RunConfig(steps=1000))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lm_coef >= 0, "lm_coef", "0 (off) or more", self.lm_coef)
        require(
            not self.unit_std or self.centre_data is not None,
            "unit_std",
            "off unless centre_data is given",
            self.unit_std,
        )


@dataclass(frozen=True)
class BuildDefaultConfig:
    """How the embedded default is made."""

    data: str
    """Folder with snippets.jsonl.gz and reviews.jsonl.gz (`text`, `label` 1 positive or 0 negative)."""
    out: str = "runs/build-default"
    """Folder to write: `default/` (what ships) and `work/` (everything on the way)."""
    seed: int = 0
    """Seeds the split, weights and order."""
    threads: int = 2
    """CPU threads of torch."""
    vocab_size: int = 4096
    """Tokens, three special ones included."""
    hidden_size: int = 192
    """Width of policy and reward model."""
    layers: int = 8
    """Blocks of the policy."""
    reward_layers: int = 4
    """Blocks of the reward model."""
    lm_steps: int = 4000
    """Optimiser steps of language modelling, 1,024 tokens each."""
    sft_steps: int = 300
    """Optimiser steps of fine-tuning, 1,024 tokens each."""
    reward_steps: int = 900
    """Optimiser steps of the reward model, 1,024 tokens each."""
    samples: int = 1024
    """Responses sampled from the policy, to centre scores on and to measure."""
    impl: Literal["auto", "ref", "cpu", "triton", "cuda"] = "auto"
    """Back-end of every kernel."""

    def __post_init__(self) -> None:
        require(self.hidden_size % 32 == 0, "hidden_size", "a multiple of 32 (the head size)", self.hidden_size)
        require(1 <= self.reward_layers <= self.layers, "reward_layers", f"in 1..{self.layers}", self.reward_layers)
        require(self.samples >= 2, "samples", "at least 2", self.samples)


@dataclass(frozen=True)
class EvaluateConfig:
    """One comparison of two checkpoints."""

    policy: str
    """Checkpoint that is judged: folder of a run, one of its checkpoints, HF directory or hub name; `default`: what
    ships with ppomax."""
    baseline: str | None = None
    """Checkpoint that it is held against, named likewise. None: what the run of `policy` started from, or `default`."""
    prompts: str | None = None
    """JSONL, CSV, Parquet or HF dataset with a `prompt` column. None: the held-out prompts of `policy`'s run, else its
    own prompts, else the held-out ones that ship with ppomax."""
    prompt_column: str = "prompt"
    """Column that holds the prompt."""
    limit: int = 256
    """Use the first so many prompts. 0: all."""
    max_prompt_tokens: int = 512
    """A longer prompt is refused by `overlong`."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """Prompts over the limit: stop with an error, keep their last tokens, or leave them out."""
    judge: Literal["reward_model", "classifier", "function", "endpoint"] = "reward_model"
    """Who judges. `classifier`: the sentiment classifier that ships with ppomax, which no training here has seen."""
    reward_model: str | None = None
    """Reward model that judges. None: the one that ships with ppomax."""
    function: str | None = None
    """Python function that judges: `file.py:name` or `package.module:name`, called as f(prompts, responses) -> one
    number each, higher is better."""
    tie_margin: float = 0.0
    """Scores that differ by no more than this are a tie."""
    endpoint: str | None = None
    """Base address of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1. It judges both orders."""
    endpoint_model: str | None = None
    """Model that the endpoint shall use."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key; it is read from nowhere else and never written."""
    criterion: str = "it is the better written, more fitting and more helpful continuation"
    """What the endpoint's model is asked to judge by."""
    workers: int = 4
    """Questions to the endpoint at once."""
    timeout: float = 60.0
    """Seconds to wait for an answer of the endpoint."""
    retries: int = 4
    """How often a question is asked again after a failure that may pass, 1, 2, 4 ... seconds later."""
    max_new_tokens: int = 48
    """Response limit in tokens, EOS included."""
    temperature: float = 1.0
    """Sampling temperature of both. 0: greedy."""
    top_p: float = 1.0
    """Nucleus of both; 1: off."""
    repetition_penalty: float = 1.0
    """Of both: divides the logits of tokens that the response holds already; 1: off."""
    slots: int = 128
    """Responses decoded together."""
    seed: int = 0
    """Seeds the responses."""
    sheet: bool = False
    """Also write sheet.html, a blind page on which people compare the same pairs; `ppomax agreement` reads their
    answers."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`."""
    out: str | None = None
    """Folder for evaluation.json. None: a dated one under runs/."""
    trust_remote_code: bool = False
    """Let a checkpoint run Python of its own. Off: such checkpoints are refused."""

    def __post_init__(self) -> None:
        require(self.limit >= 0, "limit", "0 (all) or more", self.limit)
        require(self.tie_margin >= 0, "tie_margin", "0 or more", self.tie_margin)
        require_sampling(self)
        require(self.workers >= 1, "workers", "at least 1", self.workers)
        require(self.retries >= 0, "retries", "0 or more", self.retries)
        require(self.timeout > 0, "timeout", "above 0", self.timeout)
        if self.judge == "function" and not self.function:
            raise ConfigError(
                "config: judge is function, so function must be given (file.py:name or package.module:name)"
            )
        if self.judge == "endpoint" and not (self.endpoint and self.endpoint_model):
            raise ConfigError(
                "config: judge is endpoint, so endpoint (its base address) and endpoint_model must be given"
            )


@dataclass(frozen=True)
class GenerateConfig:
    """Sample from a model. Prompts come from --prompt, --file, or standard input, one a line."""

    model: str | None = None
    """HF directory or hub name. None: the policy that ships with ppomax."""
    prompt: str | None = None
    """The prompt. None: lines of `file`, or of standard input."""
    file: str | None = None
    """Text file with one prompt a line; `-` is standard input."""
    samples: int = 1
    """Responses to each prompt; the prompt is run once for all of them."""
    max_new_tokens: int = 128
    """Response limit in tokens, EOS included."""
    min_new_tokens: int = 0
    """EOS is forbidden before this many tokens are out."""
    temperature: float = 1.0
    """Sampling temperature. 0: greedy."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set with this mass; 1: all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that the response holds already; 1: off."""
    stop: str | None = None
    """Text that ends a response, besides EOS; several are separated by `|`."""
    slots: int = 128
    """Responses decoded together."""
    seed: int = 0
    """Seeds the responses."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, or `auto`: what the checkpoint says."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`."""
    chat: bool = False
    """Put each prompt into the tokenizer's chat template as the user's turn."""
    trust_remote_code: bool = False
    """Let a checkpoint run Python of its own. Off: such checkpoints are refused."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", "at least 1", self.samples)
        require_sampling(self)
        require(self.top_k >= 0, "top_k", "0 (off) or more", self.top_k)
        require(self.slots >= 1, "slots", "at least 1", self.slots)
        known = ("auto", "float32", "bfloat16", "float16")
        require(self.dtype in known, "dtype", f"one of {', '.join(known)}", self.dtype)
        if self.prompt is not None and self.file is not None:
            raise ConfigError("config: prompt and file are both given; give one of them")

"""The update phase of the engine against the same update written in plain eager torch, in one process, in turns.

    python -m bench.update [--threads 2] [--rounds 7] [--sequences 32]

Both take the same buffer (random Llama of the shipped size, ragged prompts and responses), compute the same policy
loss, value loss and metrics, clip and step with AdamW. The eager one is what a trainer without kernels does: padded
forward, logits of every position, log_softmax, gather. Prints the largest difference of the losses, medians, their
ratio, and the peak memory of each beyond what was resident before (Linux; each in a fresh process)."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from ppomax.config import TrainConfig, load_config
from ppomax.engine import Engine
from ppomax.models import make_reward_model
from ppomax.recipe.batch import Experience, minibatch
from ppomax.recipe.update import train_minibatch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM


def make(sequences: int, impl: str) -> tuple[Engine, Experience]:
    """An engine on a random model of the shipped size, and one buffer that is one minibatch."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=192, intermediate_size=448, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=2,
        )
    )  # fmt: skip
    config = load_config(
        overrides={
            "impl": impl, "ptx.coef": 0.0, "batch.rollout_size": sequences, "batch.minibatch_size": sequences,
            "batch.micro_tokens": 1 << 20, "run.device": "cpu", "policy_optim.lr": 1e-6, "critic_optim.lr": 1e-6,
        }
    )  # fmt: skip
    engine = Engine(model, None, None, make_reward_model(model, layers=4), config)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 17, (sequences,), generator=generator).tolist()
    prompts = [torch.randint(3, 4096, (n,), generator=generator).tolist() for n in lengths]
    return engine, engine.experience(engine.rollout(prompts))


class Eager:
    """The update in plain torch, on the same modules."""

    def __init__(self, engine: Engine, exp: Experience):
        self.config: TrainConfig = engine.config
        self.policy, self.critic = engine.policy.module, engine.critic.module.model
        self.optims = [
            torch.optim.AdamW(m.parameters(), lr=1e-6, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, fused=True)
            for m in (self.policy, self.critic)
        ]
        pairs = exp.rollout.sequences()
        self.ids = pad_sequence([torch.tensor(p + r) for p, r in pairs], batch_first=True)
        self.attention = pad_sequence([torch.ones(len(p) + len(r)) for p, r in pairs], batch_first=True).long()
        self.mask = pad_sequence([torch.tensor([0] * len(p) + [1] * len(r)) for p, r in pairs], batch_first=True)[
            :, 1:
        ].bool()
        self.old, self.values, self.advantages, self.returns = (
            torch.zeros(self.mask.shape).masked_scatter_(self.mask, x)
            for x in (exp.rollout.logprobs, exp.rollout.values, exp.advantages, exp.returns)
        )

    def mean(self, x: Tensor) -> Tensor:
        return (x * self.mask).sum() / self.mask.sum()

    def step(self) -> dict[str, float]:
        loss = self.config.loss
        logits = self.policy(input_ids=self.ids, attention_mask=self.attention).logits[:, :-1].float()
        all_logprobs = torch.log_softmax(logits, -1)
        logprobs = all_logprobs.gather(-1, self.ids[:, 1:, None])[..., 0]
        log_ratio = (logprobs - self.old) * self.mask
        ratio = log_ratio.exp()
        plain, clipped = -self.advantages * ratio, -self.advantages * ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
        pg_loss = self.mean(torch.maximum(plain, clipped))
        with torch.no_grad():
            entropy = self.mean(-(all_logprobs.exp() * all_logprobs).sum(-1))
            metrics = [self.mean(ratio - 1 - log_ratio), self.mean((clipped > plain).float()), ratio.max(), entropy]
        pg_loss.backward()
        hidden = self.critic.base_model(input_ids=self.ids, attention_mask=self.attention).last_hidden_state
        values = self.critic.score(hidden)[:, :-1, 0]
        clipped_values = self.values + (values - self.values).clamp(-loss.value_clip, loss.value_clip)
        v_loss = 0.5 * self.mean(torch.maximum((values - self.returns) ** 2, (clipped_values - self.returns) ** 2))
        v_loss.backward()
        for model, optim in zip((self.policy, self.critic), self.optims, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            optim.zero_grad()
        losses = {"loss/policy_avg": float(pg_loss.detach()), "loss/value_avg": float(v_loss.detach())}
        return {**losses, **{str(i): float(m) for i, m in enumerate(metrics)}}


def engine_step(engine: Engine, exp: Experience) -> dict[str, float]:
    micros = [minibatch(exp, m) for m in exp.rollout.micro_batches[0]]
    return train_minibatch(engine.policy, engine.critic, micros, engine.config, engine.health, None)


def peak(which: str, sequences: int, threads: int) -> int:
    """Bytes of resident memory that the second step needs beyond what the first one left."""
    command = [
        sys.executable,
        "-m",
        "bench.update",
        "--only",
        which,
        "--sequences",
        str(sequences),
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_peak(which: str, sequences: int) -> int:
    from .memory import _give_back_free_memory, _status

    engine, exp = make(sequences, "auto")
    eager = Eager(engine, exp)
    run = eager.step if which == "eager" else lambda: engine_step(engine, exp)
    run()
    _give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.update", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--only", choices=("engine", "eager"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(measure_peak(args.only, args.sequences))
        return
    engine, exp = make(args.sequences, "auto")
    eager = Eager(*make(args.sequences, "auto"))
    first, second = engine_step(engine, exp), eager.step()
    gap = max(abs(first[k] - second[k]) for k in ("loss/policy_avg", "loss/value_avg"))
    times: dict[str, list[float]] = {"engine": [], "eager": []}
    for _ in range(args.rounds):
        for name, run in (("engine", lambda: engine_step(engine, exp)), ("eager", eager.step)):
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(x) for name, x in times.items()}
    print(
        f"tokens {len(exp.rollout.tokens)}, response tokens {len(exp.rollout.states)}, losses differ by at most "
        f"{gap:.2e}"
    )
    for name, median in medians.items():
        print(f"{name:7} {median * 1e3:8.1f} ms   peak {peak(name, args.sequences, args.threads) / 2**20:7.1f} MiB")
    print(f"engine / eager time: {medians['engine'] / medians['eager']:.2f}")


if __name__ == "__main__":
    main()

"""Our estimates beside figures that other engines published for jobs of like size.

Theirs are measured, ours are computed by seconds.py and have not been measured by anyone: a comparison of jobs, not
of engines. What their pages leave out (batch sizes, lengths, how weights lay) is chosen here, and said in `differs`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ppomax.planning.job import GiB, Job
from ppomax.planning.plan import Plan, gib, make_plan, shape_of
from ppomax.planning.seconds import DEVICES

A100 = DEVICES["a100-80g"]
A800 = replace(A100, name="a800-80g", link=200e9, source="NVIDIA A800 80GB: an A100 with 400 GB/s of NVLink")


@dataclass(frozen=True)
class Published:
    """One figure of another engine, and the job that comes nearest to it."""

    engine: str
    what: str
    seconds: float
    """As published."""
    source: str
    responses: int
    """That the published time is for."""
    job: Job
    differs: str
    device: Any = A100

    def ours(self) -> tuple[float, Plan]:
        """Seconds that we estimate for as many responses, and the plan."""
        plan = make_plan(self.job, self.device, advise=False)
        return sum(plan.times.values()) * self.responses / self.job.rollout_size, plan


def published() -> list[Published]:
    """The figures, oldest first."""
    chat = "DeepSpeed, blogs/deepspeed-chat/README.md, tables 1 and 2 (2023)"
    open_rlhf = "OpenRLHF README, 2024-05 to 2025-06"
    scripts = (
        "theirs: LoRA in the scripts, hybrid engine with its own decode kernels, batch sizes not stated; ours: full "
        "fine-tune under ZeRO-3, 128 responses an update"
    )
    lengths = (
        "theirs: Adam and the frozen models on the host; lengths not stated: ours at 1024 + 1024 tokens, so an upper "
        "bound; ours: all models on all GPUs under ZeRO-3, critic and reward model as large as the policy"
    )
    chat_job = {"critic": "facebook/opt-350m", "reward": "facebook/opt-350m", "prompt_tokens": 256}
    chat_job |= {"response_tokens": 256, "rollout_size": 128, "minibatch_size": 128, "slots": 16}
    open_job = {"prompt_tokens": 1024, "response_tokens": 1024, "rollout_size": 1024, "minibatch_size": 128}
    open_job |= {"slots": 16, "micro_tokens": 2048, "offload_optimizer": True}
    seven, thirteen = "huggyllama/llama-7b", "huggyllama/llama-13b"
    pairs = 131_900
    return [
        Published("DeepSpeed-Chat", "OPT-6.7B, 8 x A100-80G, 135M tokens", 4.1 * 3600, chat, pairs,
                  _job("facebook/opt-6.7b", 8, **chat_job), scripts),
        Published("DeepSpeed-Chat", "OPT-13B, 8 x A100-80G, 135M tokens", 9 * 3600, chat, pairs,
                  _job("facebook/opt-13b", 8, **chat_job), scripts),
        Published("DeepSpeed-Chat", "OPT-13B, 64 x A100-80G, 135M tokens", 1.25 * 3600, chat, pairs,
                  _job("facebook/opt-13b", 64, **{**chat_job, "rollout_size": 1024, "minibatch_size": 1024}), scripts),
        Published("DeepSpeed-Chat, tuned", "7B, 16 x A800, 1024 prompts", 855, open_rlhf, 1024,
                  _job(seven, 16, **open_job), lengths, A800),
        Published("OpenRLHF", "7B, 16 x A800, 1024 prompts", 471, open_rlhf, 1024,
                  _job(seven, 16, **open_job), lengths, A800),
        Published("DeepSpeed-Chat, tuned", "13B, 32 x A800, 1024 prompts", 1529, open_rlhf, 1024,
                  _job(thirteen, 32, **open_job), lengths, A800),
        Published("OpenRLHF", "13B, 32 x A800, 1024 prompts", 609, open_rlhf, 1024,
                  _job(thirteen, 32, **open_job), lengths, A800),
    ]  # fmt: skip


def _job(policy: str, ranks: int, **knobs: Any) -> Job:
    for role in ("critic", "reward"):
        knobs[role] = shape_of(knobs.get(role, policy))
    return Job(policy=shape_of(policy), zero_stage=3, ranks=ranks, memory=80 * GiB, **knobs)


def show_comparison(console: Any) -> None:
    """Print the table and what differs."""
    from rich.table import Table

    table = Table(title="published (measured) and ours (estimated)", title_justify="left")
    for name in ("engine", "job", "published", "ours, estimated", "ours: GiB a rank", "rollout / scoring / update"):
        table.add_column(name, justify="left" if name in ("engine", "job") else "right")
    rows = published()
    for row in rows:
        seconds, plan = row.ours()
        whole = sum(plan.times.values())
        shares = [plan.times["rollout"], plan.times["scoring"], plan.times["update"] + plan.times["step"]]
        split = " / ".join(f"{100 * part / whole:.0f}" for part in shares) + " %"
        table.add_row(row.engine, row.what, _time(row.seconds), _time(seconds), gib(plan.peak)[:-4], split)
    console.print(table)
    for line in dict.fromkeys(f"{row.source}. Differs: {row.differs}." for row in rows):
        console.print(line, highlight=False, markup=False)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.0f} s"

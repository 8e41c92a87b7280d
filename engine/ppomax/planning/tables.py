"""A plan on the console: bytes by phase and kind, time by phase, whether it fits and what to turn if not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ppomax.planning.job import GiB
from ppomax.planning.plan import Plan, gib

SHOWN_ADVICE = 6
TIGHT = 0.9
"""Above this share of the memory a plan that fits shows what would help all the same."""


def show(plan: Plan, console: Any, *, title: str = "") -> None:
    """Print the whole plan."""
    job = plan.job
    stage = "plain torch" if job.zero_stage is None else f"ZeRO-{job.zero_stage}"
    offload = [n for n, on in (("optimiser", job.offload_optimizer), ("weights", job.offload_param)) if on]
    where = f"{stage}, on the host: {', '.join(offload)}" if offload else stage
    prompts = f"{job.mean_prompt:.0f} (at most {job.prompt_lengths[-1]})" if job.prompt_lengths else job.prompt_tokens
    batch = f"{job.rollout_size} responses of {prompts} + {job.response_tokens} tokens"
    batch = f"{job.rollout_size} rows of {job.length} tokens a step" if job.alone else batch
    console.print(
        f"[bold]{title}[/]  {job.ranks} x {gib(job.memory)}, {where}, {job.train}, {job.dtype}; {batch}",
        highlight=False,
    )
    console.print(memory_table(plan))
    if plan.times:
        console.print(time_table(plan))
    for line in fit_lines(plan):
        console.print(line, highlight=False, markup=False)


def memory_table(plan: Plan) -> Any:
    """Rows: kinds; columns: phases; GiB on one rank."""
    from rich.table import Table

    table = Table(title="GiB on one rank", title_justify="left")
    table.add_column("kind")
    for phase in plan.phases:
        table.add_column(phase, justify="right", style="bold" if phase == plan.peak_phase else None)
    kinds = list(dict.fromkeys(kind for kinds in plan.phases.values() for kind in kinds))
    for kind in kinds:
        sizes = [kinds.get(kind, 0) for kinds in plan.phases.values()]
        if max(sizes) >= 0.005 * GiB:
            table.add_row(kind, *(f"{size / GiB:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("all", *(f"{sum(kinds.values()) / GiB:.2f}" for kinds in plan.phases.values()))
    return table


def time_table(plan: Plan) -> Any:
    """Rows: phases; seconds of one iteration and tokens a second over all ranks."""
    from rich.table import Table

    assert plan.device is not None
    table = Table(title=f"one iteration on {plan.device.name}, estimated", title_justify="left")
    for name in ("phase", "seconds", "share", "tokens/s"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    whole, rates = sum(plan.times.values()), plan.tokens_per_second
    for phase, seconds in plan.times.items():
        table.add_row(phase, f"{seconds:.1f}", f"{100 * seconds / whole:.0f} %", f"{rates[phase]:,.0f}")
    table.add_section()
    table.add_row("whole", f"{whole:.1f}", "", f"{rates['whole']:,.0f}")
    return table


def fit_lines(plan: Plan) -> list[str]:
    """Whether it fits, what would help, and what the figures rest on."""
    job = plan.job
    lines = [
        f"{'fits' if plan.peak <= job.memory else 'does NOT fit'}: {gib(plan.peak)} of {gib(job.memory)} a rank, "
        f"fullest in {plan.peak_phase}"
    ]
    if plan.host:
        parts = ", ".join(f"{kind} {gib(size)}" for kind, size in plan.host.items() if size)
        ok = "fits" if plan.host_fits else "does NOT fit"
        lines.append(f"host {ok}: {gib(sum(plan.host.values()))} of {gib(job.host_memory)} a node ({parts})")
    if (saves := plan.saves) is not None:
        lines.append(
            f"checkpoint: {gib(saves.state)}, written in {saves.written:.0f} s, of which training stands still for "
            f"{saves.still:.2g} s; from a kill to the next step {saves.to_next_step:.0f} s (start {saves.start:.0f}, "
            f"models {saves.models:.0f}, checkpoint {saves.read:.0f})"
        )
    if plan.most_parameters is not None:
        lines.append(
            f"decoding keeps the policy whole on each GPU: with the rest as here, up to some "
            f"{plan.most_parameters / 1e9:.3g} billion parameters of this shape; beyond, it would need tensor "
            "parallelism, which it has not"
        )
    if plan.advice and (not plan.fits or plan.peak > TIGHT * job.memory):
        lines.append("what would lower the peak, each by itself:")
        lines += [
            f"  {a.knob:40} {'-' if a.saves >= 0 else '+'}{gib(abs(a.saves))}{'  (then it fits)' if a.fits else ''}"
            for a in plan.advice[:SHOWN_ADVICE]
        ]
    lines += [f"note: {note}" for note in plan.notes]
    if plan.device:
        a = plan.assumptions
        lines.append(
            f"assumed: {plan.device.source}; {a.train_efficiency:.0%} of peak FLOPs in updates, "
            f"{a.forward_efficiency:.0%} in forwards, {a.bandwidth_efficiency:.0%} of bandwidth in decode steps, "
            f"{1000 * a.launch_seconds:g} ms of launches a block, {a.disk / 1e9:g} GB/s of disk, "
            f"{a.hash_rate / 1e9:g} of hashing a rank; every text at its length limit"
        )
    return lines


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for --json."""
    return {
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "peak_phase": plan.peak_phase,
        "memory_bytes": plan.job.memory,
        "bytes": plan.phases,
        "host_bytes": plan.host,
        "seconds": plan.times,
        "checkpoint": asdict(plan.saves) | {"to_next_step": plan.saves.to_next_step} if plan.saves else None,
        "tokens_per_second": plan.tokens_per_second,
        "advice": [asdict(a) for a in plan.advice],
        "most_parameters": plan.most_parameters,
        "device": asdict(plan.device) if plan.device else None,
        "assumptions": asdict(plan.assumptions),
        "notes": list(plan.notes),
        "job": {
            k: json.loads(v) if k in ("policy", "critic", "reward") and v else v for k, v in vars(plan.job).items()
        },
    }

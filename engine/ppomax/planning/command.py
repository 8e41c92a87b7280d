"""`ppomax plan`: the flags of its own, and the knobs of `ppomax train` or of a stage before it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppomax.config import ConfigError
from ppomax.config.mapping import nearest

if TYPE_CHECKING:
    from ppomax.planning.plan import AnyConfig


@dataclass(frozen=True)
class PlanFlags:
    """Where the run would go."""

    gpus: int | None
    """None: those of this machine, or its CPU."""
    gpus_per_node: int
    memory: float | None
    host_memory: float
    device: str
    json: bool
    compare: bool
    figures: dict[str, float]
    """Device figures and assumptions that replace the datasheet's."""


CUSTOM = {
    "tflops": "Dense bfloat16 TFLOPS of one GPU.",
    "bandwidth": "Memory bandwidth of one GPU, GB/s.",
    "link": "Bandwidth to the other GPUs of the node, one direction, GB/s.",
    "host_link": "Bandwidth to the host, one direction, GB/s.",
    "train_efficiency": "Share of peak FLOPs that updates reach.",
    "forward_efficiency": "Share of peak FLOPs that prefill and scoring reach.",
    "bandwidth_efficiency": "Share of peak bandwidth that decode steps reach.",
    "link_efficiency": "Share of link bandwidth that collectives reach.",
    "disk": "Rate of the file system, all ranks together, GB/s.",
    "hash_rate": "SHA-256 on one core, GB/s.",
    "start_seconds": "From a launcher's start to a process's first file, seconds.",
    "launch_seconds": "Host time of one block of a decode step, seconds; near 0 with CUDA graphs.",
}


def parser() -> argparse.ArgumentParser:
    """Flags that `plan` has beside the knobs."""
    out = argparse.ArgumentParser(prog="ppomax plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    out.usage = "ppomax plan [sft|reward-model] [--config NAME] [--gpus N] [--memory GiB] [options] [knobs]"
    out.description = "Memory and time of a run before it is started. Reads no weights."
    out.add_argument(
        "--gpus", default="8", metavar="N", help="GPUs in all, or `auto`: this machine's, its memory too. Default: 8."
    )
    out.add_argument("--gpus_per_node", type=int, default=8, metavar="N", help="GPUs of one node. Default: 8.")
    out.add_argument("--memory", type=float, metavar="GiB", help="Memory of one GPU. Default: the device's.")
    out.add_argument(
        "--host_memory", type=float, default=1024, metavar="GiB", help="Memory of one node's host. Default: 1024."
    )
    out.add_argument("--device", default="a100-80g", metavar="NAME", help="a100-80g, h100, h200 or mi300x.")
    out.add_argument("--json", action="store_true", help="Print plain data instead of tables.")
    out.add_argument("--compare", action="store_true", help="Our estimates beside figures that others published.")
    group = out.add_argument_group("figures that replace the datasheet's and the assumptions")
    for name, text in CUSTOM.items():
        group.add_argument(f"--{name}", type=float, metavar="X", help=text)
    return out


def split(argv: list[str]) -> tuple[PlanFlags, list[str]]:
    """The flags of `plan`, and the rest for TrainConfig. ConfigError for a value out of range."""
    try:
        given, rest = parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"ppomax plan: {error}") from error
    values = vars(given)
    values["gpus"] = None if given.gpus == "auto" else _count(given.gpus)
    figures = {name: values.pop(name) for name in CUSTOM}
    flags = PlanFlags(figures={k: v for k, v in figures.items() if v is not None}, **values)
    for name in ("gpus", "gpus_per_node", "host_memory"):
        given_ = getattr(flags, name)
        if given_ is not None and given_ <= 0:
            raise ConfigError(f"ppomax plan: --{name} must be above 0, got {getattr(flags, name)}")
    bad = [k for k, v in flags.figures.items() if v < 0 or (v == 0 and k != "launch_seconds")]
    if bad or (flags.memory is not None and flags.memory <= 0):
        raise ConfigError(f"ppomax plan: --{bad[0] if bad else 'memory'} must be above 0")
    return flags, rest


def _count(word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise ConfigError(f"ppomax plan: --gpus must be a number, or auto, got {word!r}") from error


def _place(flags: PlanFlags, memory: int) -> dict[str, Any]:
    """Where the ranks would be, as `any_job_of` takes it."""
    from ppomax.planning.job import GiB

    if flags.gpus is not None:
        per_node, host = flags.gpus_per_node, int(flags.host_memory * GiB)
        return {"ranks": flags.gpus, "memory": memory, "host_memory": host, "ranks_per_node": per_node}
    import torch

    from ppomax.planning.plan import free_host_memory

    host, count = free_host_memory(), torch.cuda.device_count()
    if not count:
        return {"ranks": 1, "memory": host, "host_memory": host, "ranks_per_node": 1, "cpu": True}
    own = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    memory = own if flags.memory is None else memory
    return {"ranks": count, "memory": memory, "host_memory": host, "ranks_per_node": count}


def run_plan(flags: PlanFlags, config: AnyConfig, title: str, console: Any) -> bool:
    """Make and show the plan; whether the run fits."""
    from ppomax.planning.job import GiB
    from ppomax.planning.plan import any_job_of, make_plan
    from ppomax.planning.seconds import DEVICES, Assumptions
    from ppomax.planning.tables import as_data, show

    if flags.device not in DEVICES:
        raise ConfigError(
            f"ppomax plan: unknown --device {flags.device!r}{nearest(flags.device, list(DEVICES))} "
            f"(known: {', '.join(DEVICES)}; others by --memory, --tflops, --bandwidth, --link)"
        )
    units = {"tflops": ("flops", 1e12), "bandwidth": ("bandwidth", 1e9), "link": ("link", 1e9)}
    units["host_link"] = ("host_link", 1e9)
    own = {units[k][0]: v * units[k][1] for k, v in flags.figures.items() if k in units}
    device = DEVICES[flags.device]
    if own:
        device = dataclasses.replace(device, name=f"{device.name} with own figures", **own)  # type: ignore[arg-type]
    scale = {"disk": 1e9, "hash_rate": 1e9}
    assumed = Assumptions(**{k: v * scale.get(k, 1) for k, v in flags.figures.items() if k not in units})
    memory = device.memory if flags.memory is None else int(flags.memory * GiB)
    job, notes = any_job_of(config, **_place(flags, memory))
    plan = make_plan(job, None if job.cpu else device, assumed, notes=notes)
    if flags.json:
        print(json.dumps(as_data(plan), indent=1))
    else:
        show(plan, console, title=title)
    return plan.fits

"""`ppomax COMMAND`: train, sft, reward-model, build-default, evaluate, report, presets.

Each command reads its flags (options.py), checks the run's folder, and calls one function of stages/. An error is one
line and exit status 2 (1 for a bug of ours); --debug shows the traceback. No torch before a command starts."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ppomax.config import PRESET_DIR, ConfigError, TrainConfig, load_config, save_config, to_dict
from ppomax.config_io import flat, nearest, read_yaml
from ppomax.options import RUN_FLAGS, Options, stage_presets

C = TypeVar("C")

FREE_ON_RESUME = ("run.", "monitor.", "threads", "out")
"""Knobs that a resumed run may change, run.seed apart: how long, where and how it is watched."""
RUN_FILES = ("metrics.jsonl", "checkpoints", "work")
"""What shows that a folder holds a run."""


# ---- the commands ---------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> None:
    """train a policy by PPO-max; with no flags, the model that ships with ppomax"""
    config = training_config("train", TrainConfig, argv)
    from ppomax.monitor import RunMonitor, read_jsonl
    from ppomax.report import write_report
    from ppomax.stages.ppo import train_ppo

    out = Path(str(config.run.out))
    console = start_logging()
    console.print(
        f"[bold]ppomax train[/]  preset {config.preset}, {config.run.steps} steps, folder {out}", highlight=False
    )
    train_ppo(config, RunMonitor(out, config, console))
    rows = read_jsonl(out / "metrics.jsonl")
    done = max((row["step"] for row in rows), default=0)
    if not (out / "policy").is_dir():
        console.print(f"stopped after step {done}; go on with: ppomax train --resume --out {out}", highlight=False)
    if done:
        console.print(f"report: {write_report([out])}", highlight=False)
    if (out / "policy").is_dir():
        console.print(f"policy: {out / 'policy'}  (AutoModelForCausalLM.from_pretrained loads it)", highlight=False)


def sft(argv: list[str]) -> None:
    """fine-tune on responses, or train a language model on plain text"""
    from ppomax.stages.sft import SftConfig, train_sft

    stage("sft", SftConfig, train_sft, argv)


def reward_model(argv: list[str]) -> None:
    """train a reward model on preference pairs"""
    from ppomax.stages.reward_model import RewardModelConfig, train_reward_model

    stage("reward-model", RewardModelConfig, train_reward_model, argv)


def build_default(argv: list[str]) -> None:
    """rebuild the model that ships with ppomax from raw labelled text (--steps N: N steps in each of its stages)"""
    from ppomax.stages.build_default import BuildDefaultConfig
    from ppomax.stages.build_default import build_default as run

    argv, steps = taken(argv, "--steps")
    for knob in ("--lm_steps", "--sft_steps", "--reward_steps"):
        argv = [*argv, knob, steps] if steps else argv
    stage("build-default", BuildDefaultConfig, run, argv)


def evaluate(argv: list[str]) -> None:
    """win / tie / lose of one checkpoint against another on given prompts"""
    from ppomax.stages.evaluate import EvaluateConfig, run_evaluation

    config = Options("evaluate", EvaluateConfig, {}).parse(argv)
    console = start_logging()
    console.print(run_evaluation(config).sentence(), highlight=False)


def report(argv: list[str]) -> None:
    """one HTML file about a run, or several runs side by side"""
    parser = argparse.ArgumentParser(prog="ppomax report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run; several are compared.")
    parser.add_argument("--out", metavar="FILE", help="File to write. Default: report.html in the first run's folder.")
    given = parser.parse_args(argv)
    from ppomax.report import write_report

    print(write_report([Path(run) for run in given.runs], Path(given.out) if given.out else None))


def presets(argv: list[str]) -> None:
    """list the presets, or show one with every knob"""
    parser = argparse.ArgumentParser(prog="ppomax presets", description=presets.__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="Show this preset's whole configuration as YAML.")
    given = parser.parse_args(argv)
    if given.name:
        import yaml

        print(yaml.safe_dump(to_dict(load_config(preset=given.name)), sort_keys=False), end="")
        return
    for command in ("train", "sft", "reward-model"):
        folder = PRESET_DIR if command == "train" else PRESET_DIR / command
        for name in stage_presets(command):
            print(f"ppomax {command} --preset {name}\n{preset_text(folder / f'{name}.yaml')}\n")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "sft": sft,
    "reward-model": reward_model,
    "build-default": build_default,
    "evaluate": evaluate,
    "report": report,
    "presets": presets,
}


# ---- what they share ------------------------------------------------------------------------------------------------


def stage(name: str, cls: type[Any], run: Callable[[Any], Path], argv: list[str]) -> None:
    """Run a stage whose configuration is `cls`; its resolved form goes to config.yaml in the run's folder."""
    config = training_config(name, cls, argv)
    out, console = folder_of(config), start_logging()
    console.print(f"[bold]ppomax {name}[/]  folder {out}", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    console.print(f"written: {run(config)}", highlight=False)


def training_config(command: str, cls: type[C], argv: list[str]) -> C:
    """The checked configuration of a training command, its folder settled; with --resume over that run's own."""
    has_run = "run" in {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    resume = "--resume" in argv
    if not has_run:  # build-default has its own `out` and `seed`, and takes up finished stages by itself
        argv = [word for word in argv if word != "--resume"]
        argv = argv if {"--out", "-h", "--help"} & set(argv) else [*argv, "--out", str(dated(command))]
    options = Options(command, cls, RUN_FLAGS if has_run else {"--resume": "--resume", "--steps": "--steps"})
    saved = saved_config(argv) if resume else None
    named = any(word.split("=")[0] in ("--config", "--preset") for word in argv)
    config: Any = options.parse(argv, None if named else saved)
    if saved is not None:
        check_resume(to_dict(config), saved)
    if has_run and config.run.out is None:
        name = config.preset if command == "train" else command
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(dated(name))))
    if not resume:
        check_fresh(folder_of(config))
    return config  # type: ignore[no-any-return]


def folder_of(config: Any) -> Path:
    """Where a training command writes."""
    return Path(str(config.run.out if hasattr(config, "run") else config.out))


def dated(name: str) -> Path:
    """A folder under runs/ that is not there yet."""
    path = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    return path if not path.exists() else path.with_name(path.name + f"-{time.time_ns() % 1000:03d}")


def check_fresh(out: Path) -> None:
    """ConfigError if `out` holds a run, or is no folder."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    found = [name for name in RUN_FILES if (out / name).exists()]
    if found:
        raise ConfigError(
            f"--out {out} holds a run already ({', '.join(found)}); go on with it by --resume, or name another folder"
        )


def saved_config(argv: list[str]) -> dict[str, Any] | None:
    """The configuration of the run that --resume goes on with; None if it left none. ConfigError: there is no run."""
    out = taken(taken(argv, "--run.out")[0], "--out")[1] or taken(argv, "--run.out")[1]
    if out is None:
        runs = sorted(Path("runs").glob("*/config.yaml"))
        raise ConfigError(
            "--resume needs --out DIR, the folder of the run" + (f"; the newest is {runs[-1].parent}" if runs else "")
        )
    if not Path(out).is_dir():
        raise ConfigError(f"--resume: there is no folder {out}; name the folder of a run, or leave --resume out")
    return read_yaml(Path(out) / "config.yaml") if (Path(out) / "config.yaml").is_file() else None


def check_resume(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """ConfigError naming the knobs in which a resumed run would differ from what it was."""
    new, old = flat(now), flat(saved)
    changed = [k for k in new if new[k] != old.get(k, new[k]) and (k == "run.seed" or not k.startswith(FREE_ON_RESUME))]
    if changed:
        named = ", ".join(f"{k} is {new[k]!r} here and {old[k]!r} in the run" for k in changed[:6])
        more = f" and {len(changed) - 6} more knobs differ" if len(changed) > 6 else ""
        raise ConfigError(f"--resume: {named}{more}; leave that out, or start anew in another --out")


def taken(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """`argv` without `flag` and its value, and that value (None: it is not there)."""
    rest, value = list(argv), None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            rest, value = argv[:i] + argv[i + 2 :], argv[i + 1]
        elif word.startswith(flag + "="):
            rest, value = argv[:i] + argv[i + 1 :], word[len(flag) + 1 :]
    return rest, value


def preset_text(path: Path) -> str:
    """What a preset's file says of itself, and the knobs that it sets."""
    words = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    knobs = "  ".join(f"{key}={value}" for key, value in flat(read_yaml(path)).items())
    return textwrap.indent(
        textwrap.fill(" ".join(words), 100) + (f"\n{textwrap.fill(knobs, 100)}" if knobs else ""), "    "
    )


def start_logging() -> Any:
    """Log lines above the progress line on a terminal, plain ones elsewhere; returns the rich console."""
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(soft_wrap=True)
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("ppomax").setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading takes a moment, and the bars would cut through the progress line
    return console


# ---- the entry point ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run `ppomax` with these arguments; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *rest = argv
    debug = "--debug" in rest
    rest = [word for word in rest if word != "--debug"]
    try:
        if command not in COMMANDS:
            raise ConfigError(f"unknown command {command!r}{nearest(command, list(COMMANDS))}")
        COMMANDS[command](rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"ppomax: error: {one_line(error)}", file=sys.stderr)
        return 2 if expected(error) else 1
    return 0


def usage() -> str:
    """The commands and what each does."""
    lines = [f"  {name:14} {(function.__doc__ or '').strip()}" for name, function in COMMANDS.items()]
    return "usage: ppomax COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`ppomax COMMAND --help` explains each flag."


def expected(error: Exception) -> bool:
    """Whether the input is to blame, as our own checks and the file system say; anything else is a bug."""
    ours = type(error).__module__.startswith("ppomax.")
    return ours or isinstance(error, (ValueError, OSError, FloatingPointError, ImportError))


def one_line(error: Exception) -> str:
    """The error's message on one line; a bug's with its class and how to see more."""
    message = " ".join(str(error).split()) or "no message"
    return message if expected(error) else f"{type(error).__name__}: {message} (a bug of ppomax; --debug shows where)"


if __name__ == "__main__":
    sys.exit(main())

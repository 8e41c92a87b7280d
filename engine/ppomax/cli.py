"""`ppomax COMMAND`: train, plan, sft, reward-model, build-default, evaluate, agreement, evaluate-reward, generate,
export, report, doctor, presets.

Each command reads its flags (options.py), checks the run's folder, and calls one function of stages/. An error is one
line and exit status 2 (1 for a bug of ours); --debug shows the traceback. A run that a signal ended before its last
step leaves a checkpoint, and exit status 130 (Ctrl-C) or 143 (SIGTERM). No torch before a command starts."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ppomax.command.folders import dated, folder_of, pop_flag, training_config
from ppomax.command.launch import parse_on_all_ranks, watched, without_local_rank
from ppomax.command.logs import into_log_files, log_of, start_logging
from ppomax.command.options import RUN_FLAGS, Options, stage_presets
from ppomax.config import PRESET_DIR, ConfigError, TrainConfig, load_config, to_dict
from ppomax.config.launcher import started_ranks
from ppomax.config.mapping import flat, nearest, read_yaml
from ppomax.config.stages import BuildDefaultConfig, RewardModelConfig, SftConfig

C = TypeVar("C")

# ---- the commands ---------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> None:
    """train a policy by PPO-max; with no flags, the model that ships with ppomax"""
    with watched(argv) as watch:
        config = parse_on_all_ranks(lambda words: training_config("train", TrainConfig, words), argv)
        if watch is not None:
            watch.silence = config.sharding.silence
        stopped = _train(config)
    if stopped is not None:
        raise stopped


def _train(config: TrainConfig) -> Exception | None:
    """Plan, train, report; what a signal left undone, if one came."""
    from ppomax.planning.plan import plan_line
    from ppomax.reporting.monitor import METRICS, RunMonitor
    from ppomax.reporting.page import closing_words, write_report
    from ppomax.saving.jsonl import read_rows
    from ppomax.sharding import ranks
    from ppomax.stages.ppo import train_ppo
    from ppomax.stages.signals import Stopped

    out = Path(str(config.run.out))
    console = start_logging(quiet=ranks.rank() > 0, file=log_of(out))
    console.print(
        f"[bold]ppomax train[/]  preset {config.preset}, {config.run.steps} steps, folder {out}", highlight=False
    )
    with ranks.fail_together():
        if ranks.rank() == 0:
            console.print(plan_line(config), highlight=False, markup=False)
    monitor = RunMonitor(out, config, console)
    stopped: Stopped | None = None
    try:
        train_ppo(config, monitor)
    except Stopped as raised:
        stopped = raised
    if ranks.rank():
        return stopped
    if monitor.halt:
        console.print(f"ended by the collapse alarm ({monitor.halt}); {out / 'alarms.jsonl'} says why", highlight=False)
    elif stopped is not None:
        console.print(f"interrupted; go on with: ppomax train --resume --out {out}", highlight=False)
    if any(row["step"] for row in read_rows(out / METRICS)):
        console.print(closing_words(out), highlight=False, markup=False)
        console.print(f"report: {write_report([out])}", highlight=False)
    if stopped is None:
        console.print(f"policy: {out / 'policy'}  (AutoModelForCausalLM.from_pretrained loads it)", highlight=False)
    return stopped


def plan(argv: list[str]) -> None:
    """memory and time of a run on given GPUs, before it is started"""
    from ppomax.planning.command import parser, run_plan, split

    kinds: dict[str, type] = {"train": TrainConfig, "sft": SftConfig, "reward-model": RewardModelConfig}
    command, argv = (argv[0], argv[1:]) if argv and argv[0] in kinds else ("train", argv)
    flags, rest = split(argv)
    if {"-h", "--help"} & set(rest):
        parser().print_help()
        print(f"\nEvery knob of `ppomax {command}` (see its --help) can be given too.")
        return
    if flags.compare:
        from ppomax.planning.compare import show_comparison

        show_comparison(start_logging())
        return
    if command != "train":
        rest = ["--data", "none", *rest]  # no row is looked at, so none need be named
    config: Any = Options(command, kinds[command], RUN_FLAGS).parse(rest)
    name = " ".join([command] * (command != "train") + [pop_flag(rest, "--config")[1] or "default"])
    if not run_plan(flags, config, f"ppomax plan {name}", start_logging()):
        raise SystemExit(3)


def sft(argv: list[str]) -> None:
    """fine-tune on responses, or train a language model on plain text"""

    def run(config: SftConfig) -> Path:
        from ppomax.stages.sft import train_sft

        return train_sft(config)

    sharded_stage("sft", SftConfig, argv, run)


def reward_model(argv: list[str]) -> None:
    """train a reward model on preference pairs"""

    def run(config: RewardModelConfig) -> Path:
        from ppomax.stages.reward_model import train_reward_model

        return train_reward_model(config)

    sharded_stage("reward-model", RewardModelConfig, argv, run)


def build_default(argv: list[str]) -> None:
    """rebuild the model that ships with ppomax from raw labelled text (--steps N: N steps in each of its stages)"""
    argv, steps = pop_flag(argv, "--steps")
    for knob in ("--lm_steps", "--sft_steps", "--reward_steps"):
        argv = [*argv, knob, steps] if steps else argv
    config = training_config("build-default", BuildDefaultConfig, argv)
    from ppomax.default.build import build_default as run

    in_its_folder("build-default", config, run)


def evaluate(argv: list[str]) -> None:
    """win / tie / lose of one checkpoint against another on given prompts"""
    from ppomax.config.stages import EvaluateConfig
    from ppomax.stages.evaluate import run_evaluation

    config = Options("evaluate", EvaluateConfig, {}).parse(argv)
    console = start_logging()
    console.print(run_evaluation(config).sentence(), highlight=False)


def agreement(argv: list[str]) -> None:
    """what people said on the sheet of an evaluation, and how far they and its judge agree"""
    parser = argparse.ArgumentParser(prog="ppomax agreement", description=agreement.__doc__)
    parser.add_argument("evaluation", type=Path, metavar="EVALUATION", help="Folder of `ppomax evaluate --sheet`.")
    parser.add_argument("answers", nargs="+", type=Path, metavar="ANSWERS", help="Files that the sheet saved.")
    given = parser.parse_args(argv)
    from ppomax.stages.sheet import agreement as read

    print(read(given.evaluation, given.answers))


def evaluate_reward(argv: list[str]) -> None:
    """a reward model on preference pairs of several sources: accuracy and calibration"""
    parser = argparse.ArgumentParser(prog="ppomax evaluate-reward", description=evaluate_reward.__doc__)
    parser.add_argument("reward_model", metavar="MODEL", help="HF folder, hub name, run of reward-model, or `default`.")
    parser.add_argument("pairs", nargs="+", metavar="PAIRS", help="Files of pairs, or an evaluation.json.")
    parser.add_argument("--max_tokens", type=int, default=2048, metavar="N", help="Longer pairs are an error.")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="Folder to write. Default: a dated one under runs/.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Let the model run Python of its own.")
    given = vars(parser.parse_args(argv))
    from ppomax.stages.evaluate_reward import evaluate_reward as run

    start_logging()
    given["out"] = given["out"] or dated("evaluate-reward")
    found = run(given.pop("reward_model"), given.pop("pairs"), **given)
    print(f"{found.table()}\nwritten: {found.path}")


def generate(argv: list[str]) -> None:
    """sample from a model by hand: text as it comes, tokens a second"""
    from ppomax.config.stages import GenerateConfig
    from ppomax.stages.generate import generate as run

    config = Options("generate", GenerateConfig, {}, layered=False).parse(argv)
    start_logging()
    run(config)


def export(argv: list[str]) -> None:
    """the policy of a run or checkpoint as a Hugging Face folder"""
    parser = argparse.ArgumentParser(prog="ppomax export", description=export.__doc__)
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="Folder of a run (its newest checkpoint) or of one."
    )
    parser.add_argument("out", metavar="OUT", help="Folder to write.")
    parser.add_argument("--base", metavar="MODEL", help="The model that the run began with, if it has moved.")
    parser.add_argument("--push-to-hub", metavar="NAME", help="Upload it to this repository, as who is logged in.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Let the model run Python of its own.")
    given = parser.parse_args(argv)
    from ppomax.stages.export import export as run

    start_logging()
    named = {"base": given.base, "push_to_hub": given.push_to_hub, "trust_remote_code": given.trust_remote_code}
    print(f"written: {run(Path(given.source), Path(given.out), **named)}")


def report(argv: list[str]) -> None:
    """one HTML file about a run, or several runs side by side"""
    parser = argparse.ArgumentParser(prog="ppomax report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run; several are compared.")
    parser.add_argument("--out", metavar="FILE", help="File to write. Default: report.html in the first run's folder.")
    given = parser.parse_args(argv)
    from ppomax.reporting.page import write_report

    print(write_report([Path(run) for run in given.runs], Path(given.out) if given.out else None))


def doctor(argv: list[str]) -> None:
    """what would stop a run on this machine; under a launcher, on all its ranks"""
    parser = argparse.ArgumentParser(prog="ppomax doctor", description=doctor.__doc__)
    parser.add_argument("--out", default="runs", metavar="DIR", help="Where runs would write. Default: runs.")
    given = parser.parse_args(argv)
    with watched(argv):
        from ppomax.sharding import ranks
        from ppomax.stages.doctor import examine, report

        words, well = report(ranks.gather_objects(examine(Path(given.out))))
        if ranks.rank() == 0:
            print(words)
    if not well:
        raise SystemExit(3)


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
    "plan": plan,
    "sft": sft,
    "reward-model": reward_model,
    "build-default": build_default,
    "evaluate": evaluate,
    "agreement": agreement,
    "evaluate-reward": evaluate_reward,
    "generate": generate,
    "export": export,
    "doctor": doctor,
    "report": report,
    "presets": presets,
}


# ---- what they share ------------------------------------------------------------------------------------------------


def sharded_stage(name: str, cls: type[C], argv: list[str], run: Callable[[C], Path]) -> None:
    """Run a stage on all ranks that a launcher started, or in one process."""
    with watched(argv) as watch:
        config: Any = parse_on_all_ranks(lambda words: training_config(name, cls, words), argv)
        from ppomax.stages.signals import Stopped

        if watch is not None:
            watch.silence = config.sharding.silence
        stopped: Stopped | None = None
        try:
            in_its_folder(name, config, run)
        except Stopped as raised:
            stopped = raised  # all ranks come to it, and none has failed
    if stopped is not None:
        raise stopped


def in_its_folder(name: str, config: C, run: Callable[[C], Path]) -> None:
    """Run a stage and say where it writes."""
    from ppomax.sharding import ranks

    console = start_logging(quiet=ranks.rank() > 0, file=log_of(folder_of(config)))
    console.print(f"[bold]ppomax {name}[/]  folder {folder_of(config)}", highlight=False)
    if isinstance(config, (SftConfig, RewardModelConfig)):
        from ppomax.planning.plan import plan_line

        with ranks.fail_together():
            if ranks.rank() == 0:
                console.print(plan_line(config), highlight=False, markup=False)
    console.print(f"written: {run(config)}", highlight=False)


def preset_text(path: Path) -> str:
    """What a preset's file says of itself, and the knobs that it sets."""
    words = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    knobs = "  ".join(f"{key}={value}" for key, value in flat(read_yaml(path)).items())
    return textwrap.indent(
        textwrap.fill(" ".join(words), 100) + (f"\n{textwrap.fill(knobs, 100)}" if knobs else ""), "    "
    )


# ---- the entry point ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run `ppomax` with these arguments; returns the exit status."""
    # Read by OpenMP when torch loads it. Threads that spin while they wait lose whole time slices as soon as another
    # program wants a core, and take cores from the kernels' own threads (bench/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = without_local_rank(list(sys.argv[1:] if argv is None else argv))
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *rest = argv
    debug = "--debug" in rest
    rest = [word for word in rest if word != "--debug"]
    try:
        if command not in COMMANDS:
            raise ConfigError(f"unknown command {command!r}{nearest(command, list(COMMANDS))}")
        if started_ranks() > 1 and command not in ("train", "sft", "reward-model", "doctor"):
            words = f"ppomax {command} runs in one process, but {started_ranks()} were started; leave the launcher out"
            raise ConfigError(words)
        COMMANDS[command](rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        into_log_files(traceback.format_exc())
        if debug:
            traceback.print_exc()
        if isinstance(status := getattr(error, "status", None), int):  # ended by a signal, its checkpoint written
            print(f"ppomax: {error}", file=sys.stderr)
            return status
        print(f"ppomax: error: {one_line(error)}", file=sys.stderr)
        return 2 if expected(error) else 1
    return 0


def usage() -> str:
    """The commands and what each does."""
    lines = [f"  {name:15} {(function.__doc__ or '').strip()}" for name, function in COMMANDS.items()]
    ends = "exit status: 0 done, 2 wrong input, 1 a bug of ppomax, 3 what is planned does not fit or the doctor\n"
    ends += "  found what ends a run, 130 / 143 ended by Ctrl-C / SIGTERM, a checkpoint written (go on with --resume)"
    head = "usage: ppomax COMMAND [options]\n\n" + "\n".join(lines)
    return f"{head}\n\n`ppomax COMMAND --help` explains each flag.\n{ends}"


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

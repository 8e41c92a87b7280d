"""Where a training command writes: a new folder, or a run's own with --resume, and never one run over another."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, TypeVar

from ppomax.command.options import RUN_FLAGS, Options
from ppomax.config import ConfigError, to_dict
from ppomax.config.mapping import flat, read_yaml

C = TypeVar("C")

FREE_ON_RESUME = ("run.", "monitor.", "sharding.", "trackers", "log_every", "threads", "out")
"""Knobs that a resumed run may change, run.seed apart: how long, where, on how many ranks and how it is watched."""
RUN_FILES = ("metrics.jsonl", "checkpoints", "work")
"""What shows that a folder holds a run."""


def training_config(command: str, cls: type[C], argv: list[str]) -> C:
    """The checked configuration of a training command, its folder settled; with --resume over that run's own."""
    has_run = "run" in {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    asked = "--resume" in argv
    if not has_run:  # build-default has its own `out` and `seed`, and takes up finished stages by itself
        argv = [word for word in argv if word != "--resume"]
        argv = argv if {"--out", "-h", "--help"} & set(argv) else [*argv, "--out", str(dated(command))]
    options = Options(command, cls, RUN_FLAGS if has_run else {"--resume": "--resume", "--steps": "--steps"})
    named = any(word.split("=")[0] in ("--config", "--preset") for word in argv)
    saved = saved_config(resumed_folder(argv)) if asked else None
    config: Any = options.parse(argv, None if named else saved)
    if has_run and config.run.out is None:
        name = config.preset if command == "train" else command
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(dated(name))))
    if asked or (has_run and config.run.resume):
        check_resume(to_dict(config), saved_config(folder_of(config)))
    else:
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


def resumed_folder(argv: list[str]) -> Path:
    """The folder that --resume goes on in. ConfigError: none is named, or it is not there."""
    out = pop_flag(pop_flag(argv, "--run.out")[0], "--out")[1] or pop_flag(argv, "--run.out")[1]
    if out is None:
        runs = sorted(Path("runs").glob("*/config.yaml"))
        newest = f"; the newest is {runs[-1].parent}" if runs else ""
        raise ConfigError(f"--resume needs --out DIR, the folder of the run{newest}")
    if not Path(out).is_dir():
        raise ConfigError(f"--resume: there is no folder {out}; name the folder of a run, or leave --resume out")
    return Path(out)


def saved_config(out: Path) -> dict[str, Any]:
    """The configuration that the run in `out` was started with. ConfigError: nothing was begun there."""
    if not has_begun(out):
        raise ConfigError(f"--resume: {out} holds no config.yaml, so no run was begun there; leave --resume out")
    return read_yaml(out / "config.yaml")


def has_begun(out: Path) -> bool:
    """Whether `out` is the folder of a run: its configuration is the first thing that a run writes."""
    return (out / "config.yaml").is_file()


def check_resume(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """ConfigError naming the knobs in which a resumed run would differ from what it was."""
    new, old = flat(now), flat(saved)
    changed = [k for k in new if new[k] != old.get(k, new[k]) and (k == "run.seed" or not k.startswith(FREE_ON_RESUME))]
    if changed:
        named = ", ".join(f"{k} is {new[k]!r} here and {old[k]!r} in the run" for k in changed[:6])
        more = f" and {len(changed) - 6} more knobs differ" if len(changed) > 6 else ""
        raise ConfigError(f"--resume: {named}{more}; leave that out, or start anew in another --out")


def pop_flag(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """`argv` without `flag` and its value, and that value (None: it is not there)."""
    rest, value = list(argv), None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            rest, value = argv[:i] + argv[i + 2 :], argv[i + 1]
        elif word.startswith(flag + "="):
            rest, value = argv[:i] + argv[i + 1 :], word[len(flag) + 1 :]
    return rest, value

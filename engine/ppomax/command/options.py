"""Command line, YAML files and presets to one frozen dataclass, with help text from the doc line under each field.

    defaults <- preset <- --config FILE or shipped name <- flags           (weakest first)
A flag is the knob's dotted name (--kl.coef 0.1); `--out`, `--steps`, `--seed`, `--resume` are short for the knobs that
all training commands share. jsonargparse reads flags and writes the help; config.mapping builds and checks.
Imports no torch, so that help is quick."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import typing
from typing import Any, TypeVar

from ppomax.config import PRESET_DIR, ConfigError, TrainConfig, build, load_config, preset_names, to_dict
from ppomax.config.layers import read_source
from ppomax.config.mapping import merge, nearest, read_yaml, undot

C = TypeVar("C")

RUN_FLAGS = {"--out": "--run.out", "--steps": "--run.steps", "--seed": "--run.seed", "--resume": "--run.resume"}
SWITCHES = ("--run.resume", "--resume", "--sheet")
"""Flags that stand alone."""
SHARED_HELP = {
    "--config": ("FILE|NAME", "YAML file of knobs, or the name of a shipped one."),
    "--preset": ("NAME", "Named set of knobs; see `ppomax presets`."),
    "--out": ("DIR", "Folder of the run. Default: a dated one under runs/."),
    "--steps": ("N", "How many steps."),
    "--seed": ("N", "Seed of everything random."),
    "--resume": (None, "Go on from the newest whole checkpoint in --out, with that run's configuration."),
    "--debug": (None, "Show the traceback of an error."),
}


class Options(typing.Generic[C]):
    """One command's flags: `parse` gives its configuration."""

    def __init__(self, command: str, cls: type[C], shorts: dict[str, str], *, layered: bool = True):
        self.command, self.cls, self.shorts = command, cls, shorts
        self.layered = layered
        """Takes --config and --preset."""

    def parse(self, argv: list[str], base: dict[str, Any] | None = None) -> C:
        """The configuration of `argv`, over a resumed run's knobs `base`. ConfigError says what is wrong."""
        argv = expand(argv, self.shorts)
        given, rest = self._shared(argv)
        layers = base if base is not None else self._layers(given.config, given.preset)
        check_keys(self.cls, layers)
        parser = self._parser(layers)
        if given.help:
            parser.print_help()
            raise SystemExit(0)
        flags = self._flags(parser, rest, layers)
        return build(self.cls, merge(layers, flags))

    def _shared(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for flag in ("--config", "--preset"):
            pre.add_argument(flag)
        pre.add_argument("-h", "--help", action="store_true")
        try:
            given, rest = pre.parse_known_args(argv)
        except argparse.ArgumentError as error:
            raise ConfigError(f"ppomax {self.command}: {error}") from error
        if not self.layered and (given.config or given.preset):
            raise ConfigError(f"ppomax {self.command}: takes neither --config nor --preset")
        return given, rest

    def _layers(self, config: str | None, preset: str | None) -> dict[str, Any]:
        """Preset and file as one mapping, not yet checked for missing knobs."""
        if self.cls is TrainConfig:
            return to_dict(load_config(config, preset=preset))
        return merge(self._stage_preset(preset), read_source(config, self.command))

    def _stage_preset(self, name: str | None) -> dict[str, Any]:
        if name is None:
            return {}
        known = stage_presets(self.command)
        if not known:
            raise ConfigError(
                f"ppomax {self.command}: got --preset {name}, but there is none here; use --config or flags"
            )
        if name not in known:
            raise ConfigError(
                f"ppomax {self.command}: unknown preset {name!r}{nearest(name, known)} (known: {', '.join(known)})"
            )
        return read_yaml(PRESET_DIR / self.command / f"{name}.yaml")

    def _parser(self, layers: dict[str, Any]) -> Any:
        from jsonargparse import ArgumentParser, set_parsing_settings

        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        parser = ArgumentParser(
            prog=f"ppomax {self.command}",
            usage=f"ppomax {self.command} [options]",
            add_help=False,
            exit_on_error=False,
            description=(self.cls.__doc__ or "").strip(),
        )
        self._add_shared(parser)
        parser.add_class_arguments(self.cls, as_group=True)
        for action in parser._actions:  # a section's own "path to a configuration file" would only be in the way
            if action.dest in _sections(self.cls):
                action.help = argparse.SUPPRESS
        parser.set_defaults(layers)
        return parser

    def _add_shared(self, parser: Any) -> None:
        """Help for the flags that are no knobs by themselves; `expand` and `_shared` have read them by now."""
        group = parser.add_argument_group("flags of all training commands" if self.layered else "flags")
        layered = ("--config", "--preset") if self.layered else ()
        for flag in SHARED_HELP:
            if flag not in (*layered, "--debug", *self.shorts) or flag in _flag_names(self.cls):
                continue  # not of this command, or a knob of its own
            metavar, text = SHARED_HELP[flag]
            knob = self.shorts.get(flag, flag)
            text += f" Short for {knob}." if knob != flag else ""
            if metavar:
                group.add_argument(flag, help=text, default=argparse.SUPPRESS, metavar=metavar)
            else:
                group.add_argument(flag, help=text, default=argparse.SUPPRESS, action="store_true")

    def _flags(self, parser: Any, argv: list[str], layers: dict[str, Any]) -> dict[str, Any]:
        from jsonargparse import ArgumentError

        known = sorted(_flag_names(self.cls) | {"--config", "--preset", "--debug", *self.shorts})
        for word in argv:
            name = word.split("=")[0]
            if word.startswith("--") and name not in known:
                raise ConfigError(f"ppomax {self.command}: unknown flag {name}{_near_flag(name, known)}")
        given = {word.split("=")[0] for word in argv}
        missing = [f"--{name}" for name in _required(self.cls) if name not in layers and f"--{name}" not in given]
        if missing:
            raise ConfigError(f"ppomax {self.command}: {' and '.join(missing)} must be given, as a flag or in --config")
        try:
            values = parser.parse_args(argv)
        except ArgumentError as error:
            raise ConfigError(self._one_line(str(error), layers, argv)) from error
        return {key: value for key, value in to_plain(values).items() if key in _fields(self.cls)}

    def _one_line(self, message: str, layers: dict[str, Any], argv: list[str]) -> str:
        """jsonargparse's message; for a value of the wrong type, our own, which is shorter."""
        key, value = re.search(r'Parser key "([^"]+)"', message), re.search(r"[Vv]alue: (.*?)\s*$", message)
        if key and value:
            try:
                build(self.cls, merge(layers, undot({key[1]: _given(argv, key[1], value[1])})))
            except ConfigError as error:
                return str(error)
            except TypeError:
                pass  # another knob is missing; this one is what is wrong here
        return f"ppomax {self.command}: " + " ".join(message.split())


def _given(argv: list[str], knob: str, otherwise: str) -> Any:
    """What `argv` gives for a knob: a list as one, all else as it stands."""
    words = [w.partition("=") for w in argv]
    following = zip(words, [*argv[1:], otherwise], strict=True)
    text = next((w[2] if w[1] else after for w, after in following if w[0] == f"--{knob}"), otherwise)
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, list) else text


def expand(argv: list[str], shorts: dict[str, str]) -> list[str]:
    """Short flags by their knobs' names, a bare switch as true, None as null."""
    out: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        flag = shorts.get(flag, flag)
        if flag in SWITCHES and not equals:
            equals, value = "=", "true"
        if value == "None" or word == "None":
            value = "null"
        out.append(f"{flag}{equals}{value}" if equals else ("null" if word == "None" else flag))
    return out


def stage_presets(command: str) -> list[str]:
    """Presets of `train`, or of the stage of that name."""
    return preset_names() if command == "train" else sorted(p.stem for p in (PRESET_DIR / command).glob("*.yaml"))


def check_keys(cls: type, mapping: dict[str, Any], prefix: str = "") -> None:
    """ConfigError for a key that `cls` does not have, the nearest one named; missing keys are allowed."""
    hints = typing.get_type_hints(cls)
    for key, value in mapping.items():
        if key not in hints:
            raise ConfigError(f"config: unknown key {prefix}{key}{nearest(key, list(hints), prefix)}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            check_keys(typing.cast(type, hints[key]), value, f"{prefix}{key}.")


def to_plain(namespace: Any) -> dict[str, Any]:
    """A jsonargparse namespace as nested mappings."""
    return namespace.as_dict()  # type: ignore[no-any-return]


def _fields(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _required(cls: Any) -> list[str]:
    """Fields without a default."""
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is none and f.default_factory is none]


def _sections(cls: Any) -> list[str]:
    return [name for name, hint in _fields(cls).items() if dataclasses.is_dataclass(hint)]


def _flag_names(cls: Any, prefix: str = "--") -> set[str]:
    out: set[str] = set()
    for name, hint in _fields(cls).items():
        out |= _flag_names(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name}
    return out


def _near_flag(name: str, known: list[str]) -> str:
    """The known flag closest to `name`: by its whole name, or by its last part (--clip_low for --loss.clip_low)."""
    tails = [flag for flag in known if flag.rpartition(".")[2] == name.lstrip("-")]
    if tails:
        return "; did you mean " + " or ".join(tails) + "?"
    hint = nearest(name, known)
    return hint if hint.startswith(";") else "; see --help"

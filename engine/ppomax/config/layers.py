"""Presets and configuration files laid over the defaults of knobs.py, weakest first:

    defaults <- preset <- configuration file or shipped name <- overrides
    config = load_config("run.yaml", preset="modern", overrides={"run.steps": 100})

Presets (`presets/*.yaml`) change the algorithm, not models, data or learning rates, so that two of them can be compared
on the same training. A configuration file may name another as its `base`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppomax.config.knobs import TrainConfig
from ppomax.config.mapping import ConfigError, build, merge, nearest, read_yaml, require, undot

PRESET_DIR = Path(__file__).parent / "presets"
CONFIG_DIR = Path(__file__).parent / "configs"


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    return sorted(p.stem for p in PRESET_DIR.glob("*.yaml"))


def config_names(command: str = "train") -> list[str]:
    """Names that `--config` of a command takes besides files."""
    return sorted(p.stem for p in _configs_of(command).glob("*.yaml"))


def _configs_of(command: str) -> Path:
    return CONFIG_DIR if command == "train" else CONFIG_DIR / command


def load_config(
    source: str | Path | dict[str, Any] | None = None,
    *,
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> TrainConfig:
    """Defaults <- preset <- `source` (YAML file, shipped name or mapping) <- `overrides` (dotted keys or nested
    mappings).

    Raises ConfigError for unknown names and keys (with the nearest known one), wrong types and values out of range.
    """
    layer = source if isinstance(source, dict) else read_source(source)
    name = preset or layer.get("preset") or TrainConfig.preset
    merged = merge(_read_preset(name), layer, undot(overrides or {}), {"preset": name})
    return build(TrainConfig, merged)


def read_source(source: str | Path | None, command: str = "train", above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A file's knobs, laid over those of the configuration that its key `base` names (a file, or a name that ships for
    `command`)."""
    if source is None:
        return {}
    if str(source) in config_names(command) and not Path(source).is_file():
        path = _configs_of(command) / f"{source}.yaml"
    elif Path(source).exists():
        path = Path(source)
    else:
        known = ", ".join(config_names(command)) or "none"
        words = f"config: no file {source} and no shipped configuration of that name for `ppomax {command}`"
        raise ConfigError(f"{words} (known: {known})")
    layer = read_yaml(path)
    base = layer.pop("base", None)
    if base is None:
        return layer
    require(isinstance(base, str), f"base in {path}", "a file or the name of a shipped configuration", base)
    if str(path) in above:
        raise ConfigError(f"config: base goes round in a circle: {' -> '.join([*above, str(path)])}")
    return merge(read_source(base, command, (*above, str(path))), layer)


def _read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        known = preset_names()
        raise ConfigError(f"config: unknown preset {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return read_yaml(PRESET_DIR / f"{name}.yaml")

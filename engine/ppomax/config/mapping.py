"""Nested mappings and YAML to frozen dataclasses and back, with errors that name the knob. Knows no particular knob."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

C = TypeVar("C")


class ConfigError(ValueError):
    """A knob that does not exist or holds a value it cannot hold; the message names the knob and the mend."""


def require(ok: bool, name: str, wanted: str, value: object) -> None:
    """Raise ConfigError for the knob `name` unless `ok`."""
    if not ok:
        raise ConfigError(f"config: {name} must be {wanted}, got {value!r}")


def require_sampling(config: Any) -> None:
    """The knobs of a command that samples without training: how long, how hot, what is cut, what is penalised."""
    require(config.max_new_tokens >= 1, "max_new_tokens", "at least 1", config.max_new_tokens)
    require(config.temperature >= 0, "temperature", "0 (greedy) or more", config.temperature)
    require(0 < config.top_p <= 1, "top_p", "in (0, 1]", config.top_p)
    penalty = config.repetition_penalty
    require(math.isfinite(penalty) and penalty > 0, "repetition_penalty", "above 0 (1: off)", penalty)


def build(cls: type[C], mapping: dict[str, Any], prefix: str = "") -> C:
    """The dataclass `cls` from nested mappings; serves any configuration dataclass, not only TrainConfig."""
    require(isinstance(mapping, dict), prefix or cls.__name__, "a mapping of knobs", mapping)
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in hints:
            raise ConfigError(f"config: unknown key {prefix}{key}{nearest(key, list(hints), prefix)}")
        values[key] = _coerce(_over_default(cls, key, value), hints[key], prefix + key)
    return cls(**values)


def _over_default(cls: type, key: str, value: Any) -> Any:
    """A section given in part is laid over the section's own default, which may differ from its class's."""
    found = next(f for f in dataclasses.fields(cls) if f.name == key)
    if not isinstance(value, dict) or found.default_factory is dataclasses.MISSING:
        return value
    default = found.default_factory()
    return merge(to_dict(default), value) if dataclasses.is_dataclass(default) else value


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain mappings of a configuration, as `build` takes them; tuples become lists."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, (tuple, list)) else x

    return plain(dataclasses.asdict(config))


def save_config(config: Any, path: str | Path) -> None:
    """Write `config` as YAML, every knob resolved; the file is whole or not there."""
    import yaml

    part = Path(path).with_name(f".part-{Path(path).name}")
    part.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    os.replace(part, path)


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other, the last one on top."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merge(out[key], value) if both else value
    return out


def undot(flat: dict[str, Any]) -> dict[str, Any]:
    """{"reward.clip": 1} -> {"reward": {"clip": 1}}; nested mappings pass through."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        out = merge(out, value)
    return out


def flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"reward": {"clip": 1}} -> {"reward.clip": 1}; undoes `undot`."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping; ConfigError names the file if it is missing, unreadable, or no mapping."""
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not valid YAML: {error}") from error
    require(loaded is None or isinstance(loaded, dict), str(path), "a YAML mapping of knobs", type(loaded).__name__)
    return loaded or {}


def nearest(key: str, known: list[str], prefix: str = "") -> str:
    """The tail of an error message: the known name closest to `key`, or all of them."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
    return f"; did you mean {prefix}{near[0]}?" if near else f" (known: {', '.join(known)})"


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type that the annotation `hint` asks for. YAML reads 1e-4 as a string, so number strings count
    as numbers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and str not in args):
            require(type(None) in args, name, "set", value)
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), name)
    if origin is Literal:
        require(value in args, name, f"one of {', '.join(map(str, args))}", value)
        return value
    if origin is tuple and args[-1] is Ellipsis:
        require(isinstance(value, (list, tuple)), name, "a list", value)
        return tuple(_coerce(v, args[0], name) for v in value)
    if origin is tuple:
        require(
            isinstance(value, (list, tuple)) and len(value) == len(args), name, f"a list of {len(args)} numbers", value
        )
        return tuple(_coerce(v, a, name) for v, a in zip(value, args, strict=True))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, name + ".")  # type: ignore[arg-type]
    return _coerce_scalar(value, hint, name)


def _coerce_scalar(value: Any, hint: type, name: str) -> Any:
    if hint is bool:
        words = {"true": True, "false": False}
        value = words.get(value.lower(), value) if isinstance(value, str) else value
        require(isinstance(value, bool), name, "true or false", value)
        return value
    if hint in (int, float):
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        require(
            math.isfinite(number) and (hint is float or (number.is_integer() and abs(number) < 2**63)),
            name,
            "a whole number" if hint is int else "finite" if math.isinf(number) else "a number",
            value,
        )
        return int(number) if hint is int else number
    require(isinstance(value, hint), name, f"a {hint.__name__}", value)
    return value

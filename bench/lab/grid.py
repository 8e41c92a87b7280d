"""The grid: arms (a preset and knobs laid over the laboratory's base), and figures with the arms they need and what the
paper says of them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ppomax.config import ConfigError, TrainConfig, load_config, to_dict
from ppomax.config.mapping import flat

GRID = Path(__file__).with_name("grid.yaml")
CLAIM = re.compile(
    r"(?P<arm>[\w.+-]+):(?P<measure>\w+)@(?P<at>\w+) (?P<sign>[<>=]) "
    r"(?:(?P<arm2>[\w.+-]+):(?P<measure2>\w+)@(?P<at2>\w+)|(?P<number>-?[\d.]+))(?: within (?P<within>[\d.]+))?"
)


class GridError(ValueError):
    """The grid, or what was asked of it, names something that is not there."""


class Term(NamedTuple):
    """A measure of an arm's runs, at a place in them."""

    arm: str
    measure: str
    at: str


@dataclass(frozen=True)
class Claim:
    """`left > right`, `left < right` or `left = right within x`, on the mean over seeds."""

    says: str
    """The paper's words, in ours."""
    test: str
    left: Term
    sign: str
    right: Term | float
    within: float = 0.0


@dataclass(frozen=True)
class Figure:
    """One figure of the paper."""

    number: str
    title: str
    arms: tuple[str, ...]
    measures: tuple[str, ...]
    """What is drawn against the step."""
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Grid:
    """All of it."""

    arms: dict[str, dict[str, Any]]
    figures: dict[str, Figure]

    def chosen(self, numbers: list[str]) -> list[Figure]:
        """Those figures, or all; GridError names one that is not there."""
        for n in numbers:
            if n not in self.figures:
                raise GridError(f"no figure {n!r} in the grid; it has {', '.join(self.figures)}")
        return [self.figures[n] for n in numbers or self.figures]

    def config(self, arm: str, seed: int, **more: Any) -> TrainConfig:
        """The run's configuration. ConfigError names an unknown preset or knob, and the arm."""
        knobs = dict(self.arms[arm])
        preset = knobs.pop("preset", None)
        try:
            return load_config(preset=preset, overrides={**knobs, "run.seed": seed, **more})
        except ConfigError as error:
            raise GridError(f"arm {arm!r}: {error}") from error

    def settings(self, arm: str) -> str:
        """A hash of the knobs in which a run of this arm differs from the defaults, whatever set them; rows with
        another one are of another experiment. A knob that is new changes no hash."""
        plain, known = flat(to_dict(TrainConfig())), flat(to_dict(self.config(arm, 0)))
        differs = {knob: value for knob, value in known.items() if value != plain.get(knob) and knob != "preset"}
        return hashlib.sha256(json.dumps(differs, sort_keys=True).encode()).hexdigest()[:12]


def read_grid(path: Path = GRID) -> Grid:
    """The grid of a file, each arm's knobs and each claim checked."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    arms = {name: {**raw["base"], **(knobs or {})} for name, knobs in raw["arms"].items()}
    figures = {}
    for number, given in raw["figures"].items():
        claims = tuple(claim(c["says"], c["test"]) for c in given.get("claims", []))
        figure = Figure(str(number), given["title"], tuple(given["arms"]), tuple(given["measures"]), claims)
        terms = [t for c in claims for t in (c.left, c.right) if isinstance(t, Term)]
        for arm in (*figure.arms, *(t.arm for t in terms)):
            if arm not in arms:
                raise GridError(f"figure {number} of {path.name} names the arm {arm!r}, which is not there")
            if arm not in figure.arms:
                raise GridError(f"figure {number} of {path.name} claims something of {arm!r}, which it does not draw")
        figures[str(number)] = figure
    grid = Grid(arms, figures)
    for arm in arms:
        grid.config(arm, 0)
    return grid


def claim(says: str, test: str) -> Claim:
    """`vanilla:gold@end < vanilla:gold@start`, `a:proxy@end = b:proxy@end within 0.2`, `a:win@end < 0.5`."""
    found = CLAIM.fullmatch(test)
    if found is None or (found["sign"] == "=") != (found["within"] is not None):
        raise GridError(f"claim {test!r} is not `arm:measure@at > arm:measure@at` or a number, `within x` for `=`")
    right: Term | float = float(found["number"]) if found["number"] else Term(*found.group("arm2", "measure2", "at2"))
    left = Term(*found.group("arm", "measure", "at"))
    return Claim(says, test, left, found["sign"], right, float(found["within"] or 0))

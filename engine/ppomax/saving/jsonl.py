"""Files of one JSON object a line that a run appends to, and that a kill may cut short. Loads nothing heavy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppomax.saving.beside import beside

log = logging.getLogger(__name__)

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Add one line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that a run wrote; [] if there is none. A last line cut short by a kill is left out, logged;
    ValueError for any other line that is no JSON."""
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not JSON ({error}); the file was changed or damaged") from error
            log.warning("%s: the last line was cut short and is left out", path)
    return rows


def keep_rows(path: Path, wanted: Callable[[Row], bool]) -> list[Row]:
    """Leave the rows that are `wanted` in `path` and return them: what a resumed run does before it writes the others
    again. Nothing happens if there is no such file."""
    if not path.is_file():
        return []
    rows = read_rows(path)
    kept = [row for row in rows if wanted(row)]
    if len(kept) < len(rows):
        log.info("%s: %d rows of steps that are done again are cut", path.name, len(rows) - len(kept))
    with beside(path) as new:
        new.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return kept

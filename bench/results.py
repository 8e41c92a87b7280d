"""Rows of bench/results/<card>.csv: append only, one row a measurement; and the table that README shows."""

import csv
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Row:
    date: str
    commit: str
    card: str
    threads: int  # of torch; on a GPU it does not matter
    versions: str
    op: str
    impl: str
    mode: str
    dtype: str
    shape: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float | None  # the least bytes that must be moved / median
    tflop_per_s: float | None  # the FLOPs of the GEMMs that the work takes / median
    share_of_peak: float | None  # of the bandwidth or the GEMM rate measured in the same run
    peak_memory_mib: float | None  # beyond inputs and results; see memory.py


COLUMNS = [field.name for field in fields(Row)]


def put_between(readme: Path, begin: str, end: str, text: str) -> None:
    """Make what stands between the lines `begin` and `end` of a file anew. ValueError: it has them not."""
    whole = readme.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{readme} has no lines '{begin}' and '{end}' to put the table between")
    head, tail = whole[: whole.index(begin)], whole[whole.index(end) :]
    readme.write_text(f"{head}{begin}\n{text}\n{tail}", encoding="utf-8")


def path_for(folder: Path, card: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".csv")


def append(folder: Path, rows: Iterable[Row]) -> Path | None:
    rows = list(rows)
    if not rows:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = path_for(folder, rows[0].card)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_text(value) for value in asdict(row).values()])
    return path


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(folder: Path) -> list[dict[str, str]]:
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: for each card and problem the newest figures of this package beside those of the same run's rivals."""
    problems: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("card", "threads", "op", "mode", "dtype", "shape"))
        same_run = problems.get(key, {})
        if same_run and next(iter(same_run.values()))["date"] != row["date"]:
            same_run = {}
        problems[key] = {**same_run, row["impl"]: row}
    lines = [
        "| card | op | mode | dtype | shape | ppomax | rivals: times slower | share of peak | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (card, threads, op, mode, dtype, shape), impls in problems.items():
        for name, row in impls.items():
            if not name.startswith("ppomax"):
                continue
            own = float(row["median_us"])
            others = ", ".join(
                f"{rival} {float(r['median_us']) / own:.2f}"
                for rival, r in impls.items()
                if not rival.startswith("ppomax")
            )
            share = f"{100 * float(row['share_of_peak']):.0f} %" if row["share_of_peak"] else ""
            where = card if threads == "0" else f"{card}, {threads} threads"
            cells = where, f"`{op}` ({name[7:]})", mode, dtype, shape, f"{own:.4g} us", others, share, row["date"][:10]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

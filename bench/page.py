"""`python -m bench page`: bench/results as one HTML page, its plots inside: for each card and op the time of every
implementation against the size of the problem, both logarithmic; and the share of the machine's ceilings."""

import html
import io
import math
from collections import defaultdict
from pathlib import Path

from .results import table

Rows = list[dict[str, str]]
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }
table { border-collapse: collapse; font-size: 12px }
td, th { border: 1px solid #ddd; padding: 3px 7px; text-align: left }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto } h2 { margin-top: 2em }"""


def write(rows: Rows, path: Path) -> Path:
    """The page at `path`, of the newest row of each measurement."""
    newest = list({_key(row): row for row in rows}.values())
    parts = [
        "<h1>ppomax: microbenchmarks</h1>",
        f"<p>{len(newest)} measurements, the newest of each. Median times.</p>",
    ]
    for card in sorted({row["card"] for row in newest}):
        own = [row for row in newest if row["card"] == card]
        parts.append(f"<h2>{html.escape(card)}</h2>")
        parts.append(f"<p>{html.escape('; '.join(sorted({row['versions'] for row in own})))}</p>")
        parts.append(_figure(_times(own), "Time against the size of the problem"))
        parts.append(_figure(_roofline(own), "Share of the bandwidth or the GEMM rate that the same run measured"))
    parts.append(f"<h2>Table</h2>{markdown_table(table(newest))}")
    body = "\n".join(parts)
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>ppomax: microbenchmarks</title><style>{STYLE}</style>{body}",
        encoding="utf-8",
    )
    return path


def size_of(shape: str) -> float:
    """Elements of a shape: 1024x512x32000, 64x512, 32768 in 8."""
    numbers = [int(x) for x in shape.replace(" in ", "x").split("x") if x.isdigit()]
    return float(math.prod(numbers[:1] if " in " in shape else numbers))


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("card", "threads", "op", "impl", "mode", "dtype", "shape"))


def _times(rows: Rows) -> str:
    """Small panels, one an op, mode and type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not row["mode"].startswith("call"):
            title = f"{row['op']}, {row['mode']}, {row['dtype']}, {row['threads']} threads"
            panels[title][row["impl"]].append((size_of(row["shape"]), float(row["median_us"])))
    columns = 3
    height = max(1, math.ceil(len(panels) / columns))
    figure, axes = pyplot.subplots(height, columns, figsize=(13, 3.4 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in sorted(lines.items(), key=lambda x: not x[0].startswith("ppomax")):
            points.sort()
            bold = 2.2 if name.startswith("ppomax") else 1.0
            axis.loglog(*zip(*points, strict=True), "o-", label=name, linewidth=bold, markersize=3 + bold)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("elements", fontsize=8)
        axis.set_ylabel("us", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=6)
    figure.tight_layout()
    return svg_of(figure)


def _roofline(rows: Rows) -> str:
    """What each of our runs reaches of its ceiling, by size."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5))
    ours: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["impl"].startswith("ppomax") and row["share_of_peak"]:
            ours[f"{row['op']} {row['mode']}"].append((size_of(row["shape"]), 100 * float(row["share_of_peak"])))
    for marker, (name, points) in zip("os^vD<>pPX*hd" * 9, ours.items(), strict=False):
        axis.loglog(*zip(*sorted(points), strict=True), marker, label=name, markersize=6)
    axis.axhline(100, color="black", linewidth=0.8)
    axis.set_xlabel("elements")
    axis.set_ylabel("% of the ceiling")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return svg_of(figure)


def svg_of(figure: object) -> str:
    from matplotlib import pyplot

    file = io.StringIO()
    figure.savefig(file, format="svg")  # type: ignore[attr-defined]
    pyplot.close(figure)  # type: ignore[arg-type]
    return file.getvalue().split("?>", 1)[-1].split("]>", 1)[-1].split('.dtd">', 1)[-1]


def _figure(svg: str, words: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(words)}.</figcaption></figure>"


def markdown_table(text: str) -> str:
    """A Markdown table as HTML."""
    head, _, *body = [line.strip("|").split("|") for line in text.splitlines()]
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(c.strip())}</td>' for c in row)}</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{html.escape(c.strip())}</th>' for c in head)}</tr>{cells}</table>"

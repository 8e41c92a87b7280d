"""`ppomax report RUN [RUN2 ...]`: one HTML file about a run, or several side by side, with nothing outside it.

In reading order: what the runs were made with and where they differ, figures at the start and the end, what went wrong
and in which metric first, curves, critic pre-training, score histograms, phase times, samples before and after,
configuration. What went wrong is the collapse alarm (alarm.py) replayed over
metrics.jsonl, so a run that was trained with the alarm off is judged too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppomax.reporting import plots, sections
from ppomax.reporting.runs import Run, read_run, short_names


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of these runs to `out` (None: report.html in the first folder); returns its path."""
    names = short_names(folders)
    runs = [read_run(folder, names[i], plots.COLOURS[i % len(plots.COLOURS)]) for i, folder in enumerate(folders)]
    out = out or Path(folders[0]) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(runs), encoding="utf-8")
    return out


def closing_words(folder: Path, examples: int = 3) -> str:
    """A run in a few lines, for the end of a training command: start and end, and some samples before and after."""
    run = read_run(folder, folder.name, plots.COLOURS[0])
    lines = [f"  {label:46} {sections.change(run, metric)}" for metric, label in sections.GLANCE.items()]
    lines.insert(1, f"  {'  in standard deviations of its start':46} {sections.gain(run)}")
    if "eval/win_rate" in (last := run.rows[-1]):
        rate, low, high = (100 * last[f"eval/win_rate{end}"] for end in ("", "_low", "_high"))
        words = f"{rate:.1f} % (95 %: {low:.1f} to {high:.1f})"
        lines.append(f"  {'win rate over the start, held-out prompts':46} {words}")
    before, after = sections.by_prompt(run.samples, last=False), sections.by_prompt(run.samples, last=True)
    for prompt in [p for p in before if p in after][:examples]:
        lines += [
            "",
            f"  {prompt}",
            f"    before: {one_line(before[prompt])}",
            f"    after:  {one_line(after[prompt])}",
        ]
    return "\n".join(["", "start -> end", *lines, ""])


def one_line(row: dict[str, Any]) -> str:
    return f"{' '.join(row['response'].split()) or '(empty)'}  [{row['score']:+.2f}]"


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document."""
    parts = [sections.header(runs), sections.differences(runs)]
    if any("objective/scores" in run.rows[0] for run in runs):
        parts += [
            sections.glance(runs),
            sections.outcome_section(runs),
            sections.section("Stability", sections.panels(runs, sections.STABILITY)),
            sections.pretraining(runs),
            sections.score_histograms(runs),
            sections.section("Learning", sections.panels(runs, sections.LEARNING)),
            sections.phase_times(runs),
            sections.sample_table(runs),
        ]
    else:  # fine-tuning or a reward model: whatever was measured
        metrics = {key: key for run in runs for row in run.rows for key in row if key != "step"}
        parts += [sections.section("Metrics", sections.panels(runs, metrics)), sections.held_out(runs)]
    parts.append(sections.configuration(runs))
    title = "ppomax: " + " against ".join(run.name for run in runs)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{sections.esc(title)}</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )


STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#f5f7fa;color:#1f2933;
  font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 60px}
header h1{font-size:24px;margin:0 0 6px}header p{margin:2px 0}
section{background:#fff;border:1px solid #e4e7eb;border-radius:8px;padding:16px 20px 18px;margin-top:18px}
h2{font-size:16px;margin:0 0 10px}h3{font-size:14px;margin:14px 0 6px;font-weight:600}
.faint{color:#7b8794}.bad{color:#b3261e;font-weight:600}.good{color:#23744d;font-weight:600}
.run{white-space:nowrap;font-weight:600}
.run i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px 18px}
.grid.wide{grid-template-columns:repeat(auto-fill,minmax(430px,1fr))}
figure{margin:0;min-width:0}figcaption{font-weight:600;font-size:12.5px;margin:0 0 2px 4px}
img{width:100%;height:auto;display:block}img.bars,.held img{max-width:760px;margin-bottom:8px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid #eef1f4}
th{font-weight:600;color:#52606d;font-size:12.5px}td{font-variant-numeric:tabular-nums}.num{text-align:right}
.texts td{min-width:110px}.prompt{color:#52606d;font-style:italic}
.score{background:#eef3f9;color:#2563a8;border-radius:4px;padding:0 5px;font-size:12px;white-space:nowrap}
details{margin-top:12px}summary{cursor:pointer;color:#2563a8}
pre{background:#f5f7fa;padding:12px;border-radius:6px;overflow:auto;font-size:12.5px}
@media print{body{background:#fff}section{break-inside:avoid;border:0}}
"""

"""Where log lines go: the console, and of several ranks a file each. Nothing heavy is loaded before its use."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any


def log_of(out: Path) -> Path | None:
    """Where a rank of several writes its log; one process has its output alone."""
    from ppomax.sharding import ranks

    number, count = ranks.position()
    return out / "logs" / f"rank-{number:04d}.log" if count > 1 else None


def start_logging(*, quiet: bool = False, file: Path | None = None) -> Any:
    """Log lines above the progress line on a terminal, plain ones elsewhere; returns the rich console. `quiet`: errors
    alone, for the ranks but the first. file: where all lines go as well, with their times."""
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(soft_wrap=True, quiet=quiet)
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    handler.setLevel(logging.ERROR if quiet else logging.NOTSET)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("ppomax").setLevel(logging.INFO)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = logging.FileHandler(file, encoding="utf-8")
        writer.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(writer)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # DeepSpeed calls torch's collectives by names that newer ones replace, and would have torch say so at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading takes a moment, and the bars would cut through the progress line
    return console


def into_log_files(words: str) -> None:
    """What need not be on the console."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            with open(handler.baseFilename, "a", encoding="utf-8") as file:
                file.write(words)

"""Rows (mappings) from JSONL, JSON, CSV, Parquet, HF datasets or memory, each with the words that name it in an error.

    for where, row in read_rows("prompts.jsonl.gz"): ...        where == "prompts.jsonl.gz:17"
    a.jsonl?prompt=question&response=answer                     columns by their names there
    2*a.jsonl + 0.5*owner/name:train                            a mixture: each row of `a` twice, every other one of `b`
Every way in gives the same thing: an iterator of (where, row). Nothing is skipped here; a row that cannot be read
stops."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Source = str | Path | Iterable[Any]
Row = Mapping[str, Any]


class DataError(ValueError):
    """A file, row or tokenizer that cannot be used; the message says which and what to do."""


def read_rows(source: Source, *, split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a file, a folder, a hub data set's name, or an iterable of mappings.

    `.jsonl`, `.jsonl.gz`, `.json` (a list, or one object a line), `.csv` and `.parquet` are read here; a folder or a
    hub name goes through the `datasets` library with `split`, which the name may give itself, and a subset with it:
    `name:split`, `name:subset:split`. `?ours=theirs&...` after it renames columns; `weight*source + ...` is a mixture,
    each source's rows as often as its weight says, a fraction of them evenly spaced. Raises DataError naming the file
    and line for anything unreadable.
    """
    if not isinstance(source, (str, Path)):
        return _numbered(source, type(source).__name__)
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    weighed = [_WEIGHED.fullmatch(term) for term in re.split(r"\s\+\s", str(source).strip())]
    if len(weighed) > 1 or any(weighed):
        return _mixed(str(source), split)
    name, query, columns = str(source).partition("?")
    if query:
        return _renamed(read_rows(name, split=split), _columns(str(source), columns))
    name, *parts = str(source).split(":")
    if len(parts) <= 2 and all(parts) and (Path(name).is_dir() or _looks_like_hub_name(name)):
        return _read_dataset(name, parts[-1] if parts else split, parts[0] if len(parts) == 2 else None)
    raise DataError(
        f"{source}: no such file or folder; give a .jsonl, .jsonl.gz, .json, .csv or .parquet file, or the name of a "
        "data set (name, name:split or name:subset:split)"
    )


_WEIGHED = re.compile(r"\s*([0-9.]+)\s*\*\s*(.+)")


def _mixed(source: str, split: str) -> Iterator[tuple[str, Row]]:
    for term in re.split(r"\s\+\s", source.strip()):
        found = _WEIGHED.fullmatch(term)
        try:
            weight, name = (float(found[1]), found[2]) if found else (1.0, term.strip())
        except ValueError:
            weight = 0.0
        if not (weight > 0 and math.isfinite(weight)):
            raise DataError(f"{source}: the weight of {term.strip()!r} must be a number above 0, as in 0.5*rows.jsonl")
        for i, named in enumerate(read_rows(name, split=split)):
            for _ in range(math.floor((i + 1) * weight) - math.floor(i * weight)):
                yield named


def _columns(source: str, query: str) -> dict[str, str]:
    """Our names of columns to theirs."""
    pairs = [pair.partition("=") for pair in query.split("&")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise DataError(
            f"{source}: after `?` go columns by our name and theirs, as in ?prompt=question&response=answer"
        )
    return {ours: theirs for ours, _, theirs in pairs}


def _renamed(rows: Iterable[tuple[str, Row]], columns: dict[str, str]) -> Iterator[tuple[str, Row]]:
    for where, row in rows:
        missing = [theirs for theirs in columns.values() if theirs not in row]
        if missing:
            raise DataError(f"{where}: column {missing[0]!r} is missing; the row has {sorted(row)}")
        yield where, {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _looks_like_hub_name(name: str) -> bool:
    known_file = name.endswith((".jsonl", ".gz", ".json", ".csv", ".parquet"))
    return not known_file and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    suffixes = path.suffixes[-2:]
    if suffixes[-1:] == [".parquet"]:
        return _read_parquet(path)
    if suffixes[-1:] == [".gz"] or suffixes[-1:] in ([".jsonl"], [".json"]):
        return _read_json(path)
    if suffixes[-1:] == [".csv"]:
        return _read_csv(path)
    raise DataError(f"{path}: cannot tell the format by the name; use .jsonl, .jsonl.gz, .json, .csv or .parquet")


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:  # some editors put a mark before the first line
            for number, line in enumerate(lines, 1):
                if number == 1 and line.lstrip().startswith("["):
                    yield from _numbered(json.loads(line + lines.read()), str(path))
                    return
                if line.strip():
                    yield _named_row(f"{path}:{number}", json.loads(line))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not JSON ({error}); one object a line is wanted") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the archive is cut short or damaged after line {number} ({error}); fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 after line {number} ({error}); convert it") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}:{reader.line_num}: the row has other columns than the first line ({reader.fieldnames})"
                    )
                yield _named_row(f"{path}:{reader.line_num}", row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); convert it") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield _named_row(f"{path}:{number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); fetch or write it again") from error


def _read_dataset(name: str, split: str, subset: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            data: Any = datasets.load_from_disk(name)[split]
        elif (Path(name) / "state.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises many kinds; all mean that there are no rows
        raise DataError(f"{name}: `datasets` cannot load split {split!r} ({type(error).__name__}: {error})") from error
    return _numbered(data, name)


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, 1):
        yield _named_row(f"{name}:{number}", row)


def _named_row(where: str, row: Any) -> tuple[str, Row]:
    if isinstance(row, str):
        row = {"prompt": row, "text": row}
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object with named columns, got {type(row).__name__}")
    return where, row

"""The raw rows of a user's table, whatever its format, each with the place that a message names.

JSON and CSV are read by the standard library, so that a message has file, line and column; pyarrow
is imported to read Parquet, Arrow and `save_to_disk` folders, datasets to read the Hub.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from posttrain.engine.errors import ConfigError
from posttrain.suites.cells import loaded_json
from posttrain.suites.faults import Faults
from posttrain.suites.location import Location

CELL = 2**31 - 1
"""Most characters of a CSV cell; the standard library's own limit is 131,072."""
_WHOLE_FLOAT = re.compile(r"-?\d+\.0+")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row as it stands in the table."""

    place: str
    """Where: "line 3" of a text file, "row 3" elsewhere."""
    values: dict[str, Any]
    """Column to value."""


def read_records(location: Location, faults: Faults) -> Iterator[Record]:
    """All rows of a table in order.

    A row that cannot be read is left out and counted in `faults`, whose `check` the caller calls at
    the end.

    Raises:
        ConfigError: the table cannot be read at all, or what reads it is not installed.
    """
    if location.kind in ("csv", "tsv"):
        yield from _separated(location, faults)
        return
    if location.kind == "json":
        yield from _json(location, faults)
        return
    if location.kind == "jsonl":
        with _open(location, faults.start) as stream:
            yield from _lines_of_json(stream, faults)
        return
    readers = {"parquet": _parquet, "folder": _folder, "hub": _hub}
    rows = readers.get(location.kind, _arrow)(location, faults.start)
    for number, values in enumerate(rows, start=1):
        yield Record(place=f"row {number}", values=values)


@contextmanager
def _open(location: Location, start: str) -> Iterator[IO[bytes]]:
    """The bytes of a text file. Raises ConfigError for a damaged gzip file."""
    assert location.path is not None, location
    try:
        with location.path.open("rb") as file:
            unpacked: Any = gzip.GzipFile(fileobj=file) if location.gz else file
            yield unpacked
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{start} is no whole gzip file: {error}") from error


def _lines_of_json(lines: Iterable[bytes], faults: Faults) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place, record = f"line {number}", None
        with faults.at(place):
            record = _object(
                loaded_json(
                    _utf8(line, first=number == 1), hint="every line has to be one JSON object"
                )
            )
        if record is not None:
            yield Record(place=place, values=record)


def _utf8(line: bytes, *, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text ({error})") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"a {type(value).__name__}, but every row has to be one JSON object with the columns "
            "as its keys"
        )
    return value


def _json(location: Location, faults: Faults) -> Iterator[Record]:
    """A list of objects, or one object per line."""
    with _open(location, faults.start) as stream:
        start = stream.peek(64)[:64] if hasattr(stream, "peek") else b""
        if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _lines_of_json(stream, faults)
            return
        content = stream.read()
    try:
        rows = loaded_json(content.removeprefix(b"\xef\xbb\xbf"), hint="a list of objects")
    except ConfigError as error:
        raise ConfigError(f"{faults.start}: {error}") from None
    for number, row in enumerate(rows, start=1):
        place, record = f"row {number}", None
        with faults.at(place):
            record = _object(row)
        if record is not None:
            yield Record(place=place, values=record)


def _separated(location: Location, faults: Faults) -> Iterator[Record]:
    """CSV and TSV. An empty cell is a missing value, as pandas has it: None. A column of whole
    numbers that became floats (3.0) because one was missing is whole again."""
    whole = _whole_columns(location, faults.start)
    for number, header, cells in _cells(location, faults.start):
        place = f"line {number}"
        if len(cells) != len(header):
            with faults.at(place):
                raise ConfigError(
                    f"{len(cells)} cells under a header of {len(header)}; quote a cell that holds "
                    "the separator"
                )
            continue
        values = {
            column: (cell.partition(".")[0] if column in whole else cell) if cell else None
            for column, cell in zip(header, cells, strict=True)
        }
        yield Record(place=place, values=values)


def _whole_columns(location: Location, start: str) -> set[str]:
    """The columns all of whose values are written as 3.0."""
    whole: set[str] | None = None
    used: set[str] = set()
    for _, header, cells in _cells(location, start):
        whole = set(header) if whole is None else whole
        for column, cell in zip(header, cells, strict=False):
            if cell and column in whole:
                used.add(column)
                if not _WHOLE_FLOAT.fullmatch(cell):
                    whole.discard(column)
        if not whole:
            break
    return (whole or set()) & used


def _cells(location: Location, start: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Of every row the line that it begins in, the header, and its cells."""
    csv.field_size_limit(CELL)
    with _open(location, start) as stream:
        lines = (_text(line, number, start) for number, line in enumerate(stream, start=1))
        reader = csv.reader(lines, delimiter="\t" if location.kind == "tsv" else ",", strict=True)
        header: list[str] | None = None
        before = 0
        try:
            for cells in reader:
                number, before = before + 1, reader.line_num
                if not cells:
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    try:
                        _check_header(header)
                    except ConfigError as error:
                        raise ConfigError(f"{start}, line {number}: {error}") from None
                    continue
                yield number, header, cells
        except csv.Error as error:
            raise ConfigError(f"{start}, line {before + 1}: {error}") from None


def _text(line: bytes, number: int, start: str) -> str:
    try:
        return _utf8(line, first=number == 1)
    except ConfigError as error:
        raise ConfigError(f"{start}, line {number}: {error}; save the table as UTF-8") from None


def _parquet(location: Location, start: str) -> Iterator[dict[str, Any]]:
    parquet = import_arrow(location, start, "parquet")
    with _told(f"{start} is not a Parquet file"):
        file = parquet.ParquetFile(location.path)
    with file, _told(f"{start} cannot be read"):
        for batch in file.iter_batches(batch_size=1024):
            yield from _rows(batch)


def _arrow(location: Location, start: str) -> Iterator[dict[str, Any]]:
    """An Arrow file, or a stream of batches such as the datasets library writes."""
    ipc = import_arrow(location, start, "ipc")
    assert location.path is not None, location
    with _told(f"{start} is not an Arrow or Feather file"):
        yield from _batches(ipc, location.path)


def _folder(location: Location, start: str) -> Iterator[dict[str, Any]]:
    ipc = import_arrow(location, start, "ipc")
    with _told(f"{start} cannot be read"):
        for path in location.arrow_files():
            yield from _batches(ipc, path)


def _batches(ipc: Any, path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield from _rows(reader.get_batch(number))
        else:
            for batch in ipc.open_stream(file):
                yield from _rows(batch)


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch. Raises ConfigError that names a column that cannot be read."""
    names = batch.schema.names
    _check_header(names)
    columns = []
    for name, column in zip(names, batch.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except Exception as error:
            raise ConfigError(
                f"column {name!r} holds what Python has no value for ({error})"
            ) from error
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _check_header(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two columns are called {twice!r}")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Says in words what pyarrow could not read."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    except Exception as error:
        # Whatever pyarrow and what it calls make of bytes that are not as they claim.
        raise ConfigError(f"{what}: {error}") from error


def _hub(location: Location, start: str) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{start}: reading the Hub needs datasets: pip install pyarrow datasets"
        ) from error
    try:
        yield from load_dataset(
            location.repo, location.config, revision=location.revision, split=location.split
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{start} could not be loaded: {type(error).__name__}: {error}"
        ) from error


def import_arrow(location: Location, start: str, module: str) -> Any:
    """A module of pyarrow. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise ConfigError(
            f"{start}: reading {location.kind} needs pyarrow: pip install pyarrow"
        ) from error

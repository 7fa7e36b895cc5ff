"""Rows of a user's table, checked one by one: what is wrong, in which file, line and column.

Only the standard library is imported up front; pyarrow is imported to read Parquet and
`save_to_disk` folders, datasets to read the Hub.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards.rubric import checked_rubric
from posttrain.suites.location import Location


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table mean what."""

    prompt: str
    answer: str
    demo: str | None
    id: str | None
    thought: str | None = None
    direct: str | None = None
    rubric: str | None = None
    rest: bool
    """Keep all other columns in the problem's `meta`, for verifiers that may read them."""

    def named(self) -> dict[str, str]:
        """Field name -> column name, for the columns that have to be there."""
        fields = {"prompt": self.prompt, "answer": self.answer, "demo": self.demo, "id": self.id}
        fields |= {"thought": self.thought, "direct": self.direct, "rubric": self.rubric}
        return {field: column for field, column in fields.items() if column is not None}


def columns_of(source: Mapping[str, Any], verifier: str) -> Columns:
    """Columns that a table's fields prompt, answer, demo, id, thought, direct and rubric name.

    The verifiers that may read other columns than the answer get them all.
    """
    return Columns(
        prompt=source["prompt"],
        answer=source["answer"],
        demo=source["demo"],
        id=source["id"],
        thought=source.get("thought"),
        direct=source.get("direct"),
        rubric=source.get("rubric"),
        rest=verifier.partition(":")[0] in ("python", "reasoning_gym"),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked row."""

    place: str
    """File and line, for messages."""
    prompt: str
    answer: str
    demo: str | None
    id: str | None
    thought: str | None = None
    direct: str | None = None
    rubric: list[dict[str, Any]] | None = None
    meta: Mapping[str, Any]


def check_schema(location: Location, columns: Columns, *, where: str) -> None:
    """Checks the columns and the row count of a Parquet file or folder without reading its rows.

    Raises:
        ConfigError: a column is missing, there is no row, or pyarrow is not installed.
    """
    if location.kind == "parquet":
        parquet = _import_arrow(location, where, "parquet")
        try:
            file = parquet.ParquetFile(location.path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: {location.text} is not a Parquet file: {error}") from error
        if file.metadata.num_rows == 0:
            raise ConfigError(f"{where}: {location.text} holds no row")
        found = list(file.schema_arrow.names)
    else:
        assert location.path is not None, location
        info = json.loads((location.path / "dataset_info.json").read_text(encoding="utf-8"))
        found = list(info["features"])
    _require(columns, found, f"{where}: {location.text}")


def read_rows(location: Location, columns: Columns, *, where: str) -> Iterator[Row]:
    """All rows of a table in order, each checked.

    Raises:
        ConfigError: a bad JSON line, a missing column, a value that is no text, an empty table; it
            names file, line and column.
    """
    empty = True
    for number, record in _records(location, where):
        empty = False
        unit = "line" if location.kind == "jsonl" else "row"
        yield _row(record, columns, f"{where}: {location.text}, {unit} {number}")
    if empty:
        raise ConfigError(f"{where}: {location.text} holds no row")


def _records(location: Location, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line or row number, counted from 1, and the raw row."""
    if location.kind == "jsonl":
        yield from _jsonl(location, where)
    elif location.kind == "parquet":
        parquet = _import_arrow(location, where, "parquet")
        with parquet.ParquetFile(location.path) as file:
            yield from enumerate(_batches(file.iter_batches(batch_size=1024)), start=1)
    elif location.kind == "folder":
        ipc = _import_arrow(location, where, "ipc")
        yield from enumerate(_stream_rows(ipc, location), start=1)
    else:
        yield from enumerate(_hub_rows(location, where), start=1)


def _jsonl(location: Location, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    assert location.path is not None, location
    with location.path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{where}: {location.text}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ConfigError(f"{place}: not UTF-8 text ({error})") from error
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{place}: not JSON ({error.msg} at character {error.pos + 1}): "
                    f"{line[:80].decode('utf-8', 'replace').strip()!r}; "
                    "every line has to be one JSON object"
                ) from error
            if not isinstance(record, dict):
                raise ConfigError(
                    f"{place}: a {type(record).__name__}, but every line has to be one JSON object "
                    "with the columns as its keys"
                )
            yield number, record


def _stream_rows(ipc: Any, location: Location) -> Iterator[dict[str, Any]]:
    for path in location.arrow_files():
        with ipc.open_stream(str(path)) as stream:
            yield from _batches(stream)


def _batches(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def _hub_rows(location: Location, where: str) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{where}: {location.text}: reading the Hub needs datasets: "
            "pip install pyarrow datasets"
        ) from error
    try:
        yield from load_dataset(
            location.repo, location.config, revision=location.revision, split=location.split
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{where}: {location.text} could not be loaded: {type(error).__name__}: {error}"
        ) from error


def _import_arrow(location: Location, where: str, module: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise ConfigError(
            f"{where}: {location.text}: reading {location.kind} needs pyarrow: pip install pyarrow"
        ) from error


def _require(columns: Columns, found: list[str], place: str) -> None:
    for field, column in columns.named().items():
        if column not in found:
            raise ConfigError(
                f"{place}: column {column!r} is missing; "
                f"{choices_text(column, found, label='columns there')}; "
                f'name the right one with {field} = "..."'
            )


def _row(record: dict[str, Any], columns: Columns, place: str) -> Row:
    _require(columns, list(record), place)
    used = set(columns.named().values())
    rest = {key: value for key, value in record.items() if key not in used}
    if columns.rest:
        _require_json(rest, place)
    prompt = _text(record, columns.prompt, place)
    if not prompt.strip():
        raise ConfigError(f"{place}: column {columns.prompt!r} is empty; a problem needs a prompt")
    return Row(
        place=place,
        prompt=prompt,
        answer=_text(record, columns.answer, place),
        demo=None if columns.demo is None else _text(record, columns.demo, place),
        id=None if columns.id is None else _text(record, columns.id, place),
        thought=None if columns.thought is None else _text(record, columns.thought, place),
        direct=None if columns.direct is None else _text(record, columns.direct, place),
        rubric=None if columns.rubric is None else _rubric(record, columns.rubric, place),
        meta=rest if columns.rest else {},
    )


def _text(record: dict[str, Any], column: str, place: str) -> str:
    """A text or number as text."""
    value = record[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise ConfigError(
        f"{place}: column {column!r} holds {str(value)[:60]!r} ({type(value).__name__}); "
        "it has to be a text or a number"
    )


def _rubric(record: dict[str, Any], column: str, place: str) -> list[dict[str, Any]]:
    try:
        return checked_rubric(record[column])
    except ConfigError as error:
        raise ConfigError(f"{place}: column {column!r}: {error}") from None


def _require_json(rest: dict[str, Any], place: str) -> None:
    for key, value in rest.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{place}: column {key!r} cannot be handed to the verifier ({error}); "
                "store it as text, a number, a list or an object, or leave it out of the table"
            ) from error

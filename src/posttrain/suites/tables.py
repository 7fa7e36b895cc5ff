"""A user's tables: where one lies, and its rows, checked one by one, with file, line and column.

    algebra.jsonl   algebra.parquet   folder of datasets' save_to_disk   folder#split
    hub:owner/name[:config]@commit#split

Identity is the sha256 of a local file's bytes; for the Hub it is the reference itself, which
therefore has to name a commit. Only the standard library is imported up front; pyarrow is imported
to read Parquet and `save_to_disk` folders, datasets to read the Hub.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.fingerprint import digest, file_digest
from posttrain.engine.hashes import HashFile
from posttrain.rewards.spec import checked_rubric

_HUB = re.compile(
    r"hub:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>[^#]*))?(?:#(?P<split>.*))?"
)
_HUB_SPELLING = "hub:owner/name[:config]@commit#split"


@dataclass(frozen=True, kw_only=True)
class Location:
    """One table; make it with `parse_location`."""

    text: str
    """As the user wrote it, with an absolute path for a local table."""
    kind: str
    """jsonl, parquet, folder or hub."""
    path: Path | None = None
    """The file, or the folder that holds state.json; None for the Hub."""
    repo: str = ""
    config: str | None = None
    revision: str = ""
    split: str = ""

    def digest(self, hash_file: HashFile = file_digest) -> str:
        """sha256 of the file; for a folder, of the sha256 of its data files in reading order.

        Raises:
            ConfigError: the table lies on the Hub, where the reference is the identity.
        """
        if self.path is None:
            raise ConfigError(f"{self.text}: a Hub table has no local bytes")
        if self.kind == "folder":
            return digest([hash_file(file) for file in self.arrow_files()])
        return hash_file(self.path)

    def arrow_files(self) -> list[Path]:
        """Data files of a `save_to_disk` folder, in the order in which its rows are read."""
        assert self.path is not None and self.kind == "folder", self
        state = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        return [self.path / item["filename"] for item in state["_data_files"]]


def parse_location(text: str, base_dir: Path, *, where: str) -> Location:
    """Reads a location; relative paths are relative to `base_dir`.

    Raises:
        ConfigError: the file does not exist, has another ending, is an unreadable folder, or a Hub
            reference without a commit or split.
    """
    if text.startswith("hub:"):
        return _parse_hub(text, where)
    path = (base_dir / text).absolute()
    folder, mark, split = str(path).rpartition("#")
    if mark and Path(folder).is_dir():
        return _parse_folder(Path(folder), split, where)
    if path.is_dir():
        return _parse_folder(path, "", where)
    kinds = {".jsonl": "jsonl", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise ConfigError(
            f"{where}: {text!r} is not a table that can be read; give a .jsonl or .parquet file, a "
            f"folder written by datasets' save_to_disk, or {_HUB_SPELLING!r}"
        )
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*") if file.suffix in kinds]
        raise ConfigError(
            f"{where}: file {path} does not exist; "
            f"{choices_text(path.name, beside, label='tables in that directory')}"
        )
    if path.stat().st_size == 0:
        raise ConfigError(f"{where}: file {path} is empty; it needs at least one row per split")
    return Location(text=str(path), kind=kinds[path.suffix], path=path)


def _parse_hub(text: str, where: str) -> Location:
    match = _HUB.fullmatch(text)
    if match is None:
        raise ConfigError(f"{where}: {text!r} has to be written {_HUB_SPELLING!r}")
    revision, split = match["revision"] or "", match["split"] or ""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        given = f"the revision {revision!r} can move" if revision else "the revision is missing"
        raise ConfigError(
            f"{where}: {text!r}: {given}. A table's identity has to be fixed, or the same recipe "
            "would silently train on other rows tomorrow: give the 40-digit commit that stands "
            f"under 'Files and versions' on the dataset's page, as in {_HUB_SPELLING!r}"
        )
    if not split:
        raise ConfigError(f"{where}: {text!r} names no split; write {_HUB_SPELLING!r}")
    return Location(
        text=text,
        kind="hub",
        repo=match["repo"],
        config=match["config"],
        revision=revision,
        split=split,
    )


def _parse_folder(path: Path, split: str, where: str) -> Location:
    splits_file = path / "dataset_dict.json"
    if splits_file.is_file():
        splits = json.loads(splits_file.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            problem = f"has no split {split!r}" if split else "holds several splits; name one"
            example = f"{path.name}#{splits[0]}" if splits else path.name
            raise ConfigError(
                f"{where}: folder {path} {problem}, as in {example!r}; "
                f"{choices_text(split, splits, label='splits')}"
            )
        return Location(text=f"{path}#{split}", kind="folder", path=path / split, split=split)
    if split:
        raise ConfigError(f"{where}: folder {path} holds one table and no split {split!r}")
    if not (path / "state.json").is_file():
        raise ConfigError(
            f"{where}: folder {path} was not written by datasets' save_to_disk (no state.json); "
            "name a .jsonl or .parquet file in it"
        )
    return Location(text=str(path), kind="folder", path=path)


FIELDS = ("prompt", "answer", "demo", "id", "thought", "direct", "rubric")
"""What a column of a table may mean; `posttrain.suites.domain.Table` says what each is for."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table mean what."""

    named: Mapping[str, str]
    """Field -> the column that has to be there for it; prompt and answer at least."""
    keep_rest: bool
    """Keep all other columns in the problem's `meta`, for verifiers that may read them."""


def columns_of(source: Mapping[str, Any], verifier: str) -> Columns:
    """The columns that the identity of a table names, where the domain has this verifier."""
    return Columns(
        named={field: source[field] for field in FIELDS if source.get(field) is not None},
        keep_rest=verifier.partition(":")[0] in ("python", "reasoning_gym"),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked row."""

    place: str
    """File and line, for messages."""
    id: str | None
    """Its own name, None where the table has no column for it."""
    problem: dict[str, Any]
    """The fields of a problem that a table gives: prompt, answer, demo, meta; thought, direct and
    rubric only where they are named."""

    @property
    def prompt(self) -> str:
        """The text of the problem."""
        return str(self.problem["prompt"])


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
        return _jsonl(location, where)
    readers = {"parquet": _parquet_rows, "folder": _folder_rows, "hub": _hub_rows}
    return enumerate(readers[location.kind](location, where), start=1)


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


def _parquet_rows(location: Location, where: str) -> Iterator[dict[str, Any]]:
    parquet = _import_arrow(location, where, "parquet")
    with parquet.ParquetFile(location.path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _folder_rows(location: Location, where: str) -> Iterator[dict[str, Any]]:
    ipc = _import_arrow(location, where, "ipc")
    for path in location.arrow_files():
        with ipc.open_stream(str(path)) as stream:
            for batch in stream:
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
    for field, column in columns.named.items():
        if column not in found:
            raise ConfigError(
                f"{place}: column {column!r} is missing; "
                f"{choices_text(column, found, label='columns there')}; "
                f'name the right one with {field} = "..."'
            )


def _row(record: dict[str, Any], columns: Columns, place: str) -> Row:
    _require(columns, list(record), place)
    meta = {}
    if columns.keep_rest:
        used = columns.named.values()
        meta = {key: value for key, value in record.items() if key not in used}
        _require_json(meta, place)
    values = {
        field: _value(field, record[column], f"{place}: column {column!r}")
        for field, column in columns.named.items()
    }
    name = values.pop("id", None)
    if not values["prompt"].strip():
        column = columns.named["prompt"]
        raise ConfigError(f"{place}: column {column!r} is empty; a problem needs a prompt")
    first = {"prompt": values["prompt"], "answer": values["answer"], "demo": values.get("demo")}
    return Row(place=place, id=name, problem=first | {"meta": meta} | values)


def _value(field: str, value: Any, place: str) -> Any:
    """A rubric as it is, anything else as text."""
    if field == "rubric":
        try:
            return checked_rubric(value)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise ConfigError(
        f"{place} holds {str(value)[:60]!r} ({type(value).__name__}); "
        "it has to be a text or a number"
    )


def _require_json(rest: dict[str, Any], place: str) -> None:
    for key, value in rest.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{place}: column {key!r} cannot be handed to the verifier ({error}); "
                "store it as text, a number, a list or an object, or leave it out of the table"
            ) from error

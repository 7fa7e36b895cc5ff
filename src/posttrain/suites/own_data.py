"""Data of a user's own that is no domain: what tables of preferences and of rows to imitate have in
common. Such a table has no verifier and no splits: every row of it is learned from.

A table is read while planning, where it lies on this machine, and again when its artifact is made.
All bad rows are told at once, with file, line and column.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from posttrain.backends.prompting import readable
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.fingerprint import file_digest, plain
from posttrain.engine.hashes import HashFile
from posttrain.engine.jsonl import write_jsonl
from posttrain.rewards.spec import NodeParts
from posttrain.suites import tables
from posttrain.suites.tables import Location, parse_location

SHOWN = 10
"""Bad rows that one message names; it counts the others."""

Row = dict[str, Any]
Message = dict[str, Any]
Counts = dict[str, Any]
Made = tuple[list[Row], Counts]
ReadRow = Callable[[Mapping[str, Any], str], list[Row]]
"""What becomes of one row of the table; its second argument is file and line, for messages."""


def table_node(
    source: Any, name: str, base_dir: Path, *, where: str, make: Callable[..., Made],
    hash_file: HashFile = file_digest,
) -> NodeParts:  # fmt: skip
    """The parts of the graph node of a table; `make(config, location)` reads it.

    Identity are the name, the columns and the bytes (of a Hub table its reference). In `runtime`
    are "file", where it lies, and of a local table "counts", what `make` counted.

    Raises ConfigError for a location, a column or a row that is wrong.
    """
    location = parse_location(source.data, base_dir, where=where)
    data, runtime = {}, {"file": location.text}
    config = {"name": name, "table": location.text if location.path is None else location.kind}
    config |= columns_of(source)
    if location.path is not None:
        data["table"] = location.digest(hash_file)
        _, counts = make(config, location, where=where)
        runtime["counts"] = counts
    return NodeParts(config=plain(config, at=where), data=data, runtime=runtime)


def columns_of(source: Any) -> dict[str, str]:
    """Field to column, of those that are named."""
    named = {field.name: getattr(source, field.name) for field in fields(source)}
    return {name: column for name, column in named.items() if column is not None and name != "data"}


def build_table(
    file: str,
    config: Mapping[str, Any],
    runtime: Mapping[str, Any],
    out: Path,
    data: Mapping[str, str],
    *,
    where: str,
    make: Callable[..., Made],
) -> Counts:
    """Write the rows of a table into `out / file`; the others are the parts of `table_node`.

    Returns what was counted. Raises ConfigError for a table that is wrong or has changed since.
    """
    location = parse_location(runtime["file"], Path(), where=where)
    if location.path is not None and location.digest() != data["table"]:
        raise ConfigError(
            f"{where}: {location.text} changed since the plan was made, so its rows are not the "
            "ones that the artifact's identity names; run the command again"
        )
    rows, counts = make(config, location, where=where)
    write_jsonl(out / file, rows)
    return counts


def read_all(location: Location, read: ReadRow, *, where: str) -> tuple[list[Row], int, int]:
    """All rows that `read` makes, without exact repeats; how many rows the table has, and how many
    made nothing new because they repeat others.

    Raises ConfigError with all bad rows together.
    """
    found: dict[str, Row] = {}
    bad: list[str] = []
    num_read = repeats = 0
    for place, record in records(location, where):
        num_read += 1
        try:
            made = read(record, place)
        except ConfigError as error:
            bad.append(str(error))
            continue
        keys = [json.dumps(row, ensure_ascii=False) for row in made]
        fresh = {key: row for key, row in zip(keys, made, strict=True) if key not in found}
        repeats += bool(made) and not fresh
        found |= fresh
    if bad:
        more = f"\n... and {len(bad) - SHOWN} more rows" if len(bad) > SHOWN else ""
        raise ConfigError("\n".join(bad[:SHOWN]) + more)
    if not found:
        raise ConfigError(f"{where}: {location.text} holds no row that can be learned from")
    return list(found.values()), num_read, repeats


def records(location: Location, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each raw row of a table, after its file and line."""
    unit = "line" if location.kind == "jsonl" else "row"
    for number_, record in tables._records(location, where):
        yield f"{where}: {location.text}, {unit} {number_}", record


def lengths(texts: Iterable[str]) -> Counts:
    """Median and longest characters of texts."""
    sizes = [len(text) for text in texts]
    return {"median_characters": int(median(sizes)), "longest_characters": max(sizes)}


# -- one row ---------------------------------------------------------------------------------------


def cell(record: Mapping[str, Any], field: str, column: str, place: str) -> Any:
    """The value of a column. Raises ConfigError where the row has none."""
    if column not in record:
        raise ConfigError(
            f"{place}: column {column!r} is missing; "
            f"{choices_text(column, record, label='columns there')}; "
            f'name the right one with {field} = "..."'
        )
    value = record[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ConfigError(f"{place}: column {column!r} is empty; fill it, or leave the row out")
    return value


def number(value: Any, place: str) -> float:
    """A finite number, also as a text."""
    try:
        if isinstance(value, bool):
            raise ValueError
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{place} holds {str(value)[:60]!r}; it has to be a number")
    return found


def text(value: Any, place: str) -> str:
    """A text that is not blank; a number becomes one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise ConfigError(
            f"{place} holds {str(value)[:60]!r} ({type(value).__name__}); it has to be a text"
        )
    if not value.strip():
        raise ConfigError(f"{place} is empty; fill it, or leave the row out")
    return value


def conversation(value: Any, place: str) -> list[Message] | None:
    """A list of messages, None for what is none at all, such as a text."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    found = []
    for number_, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f'{place}: message {number_} is {str(message)[:60]!r}; a message is written '
                '{"role": "user", "content": "..."}'
            )
        # Arrow gives every message the keys that any of them has.
        found.append({key: part for key, part in message.items() if part is not None})
    if not found:
        raise ConfigError(f"{place} holds no message")
    return found


def response(value: Any, place: str) -> tuple[list[Message], str]:
    """A response that is given as a text or as messages: the messages before it, if the whole
    conversation is given, and its text."""
    messages = conversation(value, place)
    if messages is None:
        return [], text(value, place)
    *before, last = messages
    if last["role"] != "assistant":
        raise ConfigError(
            f"{place}: its last message is one of the role {last['role']!r}; a response is a "
            "message of the role 'assistant'"
        )
    return before, text(last.get("content"), f"{place}: its last message")


def asked_for(prompt: Any, system: str | None, place: str) -> Row:
    """The fields of a row that say what the model is shown: `prompt`, and `messages` where that is
    more than one message of a user."""
    messages = conversation(prompt, place)
    if messages is None:
        messages = [{"role": "user", "content": text(prompt, place)}]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"{place}: it ends with a message of the role 'assistant'; a prompt ends before the "
            "response, with what the model is to answer"
        )
    shown = readable(messages)
    if not shown.strip():
        raise ConfigError(f"{place} is empty; fill it, or leave the row out")
    plain_user = len(messages) == 1 and set(messages[0]) == {"role", "content"}
    if plain_user and messages[0]["role"] == "user":
        return {"prompt": shown}
    return {"prompt": shown, "messages": messages}


def named_row(name: str, asked: Row) -> Row:
    """The beginning of a row: its domain, and an id that is the same for the same prompt."""
    key = asked["prompt"]
    if "messages" in asked:
        key = json.dumps(asked["messages"], ensure_ascii=False, sort_keys=True)
    digest = hashlib.sha256(key.encode("utf-8")).hexdigest()
    return {"id": f"{name}-{digest[:12]}", "domain": name} | asked


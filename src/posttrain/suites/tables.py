"""A user's tables: their rows, checked one by one, as the fields of a problem."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.backends.prompting import readable, said
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards.spec import UNVERIFIED, checked_rubric
from posttrain.suites.cells import is_missing, plain_value, text_of
from posttrain.suites.faults import Faults
from posttrain.suites.location import TEXT_KINDS, Location
from posttrain.suites.messages import (
    Message,
    conversation,
    conversations_in,
    from_cell,
    is_plain,
    looks_like_messages,
    read_messages,
    with_system,
)
from posttrain.suites.records import Record, read_records

FIELDS = (
    *("prompt", "answer", "demo", "id", "thought", "direct", "rubric"),
    *("messages", "system_column"),
)
"""What a column of a table may mean; `posttrain.suites.domain.Table` says what each is for."""

PREFERENCES = ("chosen", "rejected")
"""Columns of a table of preferences, which is no domain."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table mean what."""

    named: Mapping[str, str]
    """Field -> the column that has to be there for it; prompt or messages at least."""
    optional: frozenset[str] = frozenset()
    """Those of the fields whose column need not be there."""
    keep_rest: bool
    """Keep all other columns in the problem's `meta`, for verifiers that may read them."""
    system: str | None = None
    """The system message of every row that has none of its own."""
    cells: bool = False
    """Whether a list of messages may be the JSON text of a cell."""
    json: bool = False
    """Whether they come from JSON, which has null for a missing value and no NaN."""

    @property
    def demonstrated(self) -> bool:
        """Whether the rows are to have demonstrations."""
        return "demo" in self.named or "messages" in self.named


def columns_of(source: Mapping[str, Any], verifier: str) -> Columns:
    """The columns that the identity of a table names, where the domain has this verifier."""
    named = {field: source[field] for field in FIELDS if source.get(field) is not None}
    if "messages" in named:
        named.pop("prompt", None)
    return Columns(
        named=named,
        optional=frozenset({"answer"} if verifier == UNVERIFIED else ()),
        keep_rest=verifier.partition(":")[0] in ("python", "reasoning_gym"),
        system=source.get("system"),
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
    rubric where they are named, and messages where the model is shown more than one text."""
    notes: Counter[str] = field(default_factory=Counter)
    """What there is to tell of it: `NO_DEMO`, `LEFT_OUT`."""

    @property
    def prompt(self) -> str:
        """The text of the problem."""
        return str(self.problem["prompt"])

    @property
    def asked(self) -> Sequence[Message]:
        """What the model is shown."""
        found: Sequence[Message] = self.problem.get("messages") or (
            {"role": "user", "content": self.prompt},
        )
        return found

    @property
    def text(self) -> str:
        """All that a model reads of it, the demonstration included."""
        return "\n".join([*map(said, self.asked), self.problem["demo"] or ""])


NO_DEMO = "no_demo"
"""A row without the demonstration that its columns promise."""
LEFT_OUT = "left_out"
"""A value of a column that nobody asked for which has no JSON form."""


def read_rows(location: Location, columns: Columns, *, where: str) -> Iterator[Row]:
    """All rows of a table in order, each checked.

    Raises:
        ConfigError: after the last row, where some cannot be used: the first of them by line and
            column, and how many there are. At once where a column is missing from the first row, or
            where the table cannot be read or holds no row.
    """
    faults = Faults(f"{where}: {location.text}")
    columns = replace(
        columns, cells=location.kind in ("csv", "tsv"), json=location.kind in ("json", "jsonl")
    )
    empty = True
    for record in read_records(location, faults):
        if empty:
            # Every row of other files has the same columns.
            of_line = f", {record.place}" if location.kind in TEXT_KINDS else ""
            _require(columns, record.values, faults.start + of_line)
        empty = False
        row = None
        with faults.at(record.place):
            _require(columns, record.values)
            row = _row(record, columns, f"{faults.start}, {record.place}")
        if row is not None:
            yield row
    faults.check()
    if empty:
        raise ConfigError(f"{faults.start} holds no row")


def _require(columns: Columns, record: Mapping[str, Any], place: str = "") -> None:
    for name, column in columns.named.items():
        if column in record or name in columns.optional:
            continue
        start = f"{place}: " if place else ""
        raise ConfigError(f"{start}column {column!r} is missing; {_instead(name, column, record)}")


def _instead(name: str, column: str, record: Mapping[str, Any]) -> str:
    """What to write where a column is missing."""
    found = list(record)
    if all(key in found for key in PREFERENCES):
        return (
            f"its columns {', '.join(found)} are those of preferences, which are data of "
            'r.preferences("...") and no domain'
        )
    talks = conversations_in(record)
    if name == "prompt" and talks is not None:
        return f'the column {talks!r} holds conversations; write messages = "{talks}"'
    if len(found) == 1 and any(mark in found[0] for mark in ";\t|"):
        return (
            f"the header is the one cell {found[0]!r}; cells of a .csv are separated by commas, "
            "those of a .tsv by tabs"
        )
    known = choices_text(column, found, label="columns there")
    return f'{known}; name the right one with {name} = "..."'


def _row(record: Record, columns: Columns, place: str) -> Row:
    notes: Counter[str] = Counter()
    meta: dict[str, Any] = {}
    if columns.keep_rest:
        used = columns.named.values()
        rest = {key: value for key, value in record.values.items() if key not in used}
        meta, left_out = plain_value(rest)
        notes[LEFT_OUT] = left_out
    values = {
        name: _value(name, record.values.get(column), column, columns)
        for name, column in columns.named.items()
        if name not in columns.optional
    }
    for name in columns.optional:
        value = record.values.get(columns.named[name])
        try:
            values[name] = None if is_missing(value) else text_of(value)
        except ConfigError:
            # Nobody asked for it.
            notes[LEFT_OUT] += 1
    own_id, demo = values.pop("id", None), values.pop("demo", None)
    asked, last, silent = _asked(values, columns)
    if last is not None and demo is not None:
        raise ConfigError(
            f"column {columns.named['demo']!r} holds a demonstration, and the conversation ends "
            "with one of its own; leave one of them out"
        )
    demo = last if demo is None else demo
    # Of a conversation that ends with the user the earlier turns can be learned.
    said_before = any(message["role"] == "assistant" and message["content"] for message in asked)
    promised = columns.demonstrated and demo is None
    notes[NO_DEMO] = int(promised and (silent or not said_before))
    first = {"prompt": readable(asked), "answer": values.get("answer"), "demo": demo, "meta": meta}
    # Of the later fields only those that the row has.
    later = {
        name: values[name]
        for name in ("thought", "direct", "rubric")
        if values.get(name) is not None
    }
    if not is_plain(asked):
        later["messages"] = asked
    return Row(place=place, id=own_id, problem=first | later, notes=+notes)


def _asked(values: Mapping[str, Any], columns: Columns) -> tuple[list[Message], str | None, bool]:
    """What the model is shown, the text of the assistant's last message, and whether there is such
    a message that says nothing or calls a tool."""
    given = values["messages"] if "messages" in values else values["prompt"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    parted = conversation(given)
    system = columns.system
    if "system_column" in columns.named:
        system = values["system_column"]
    silent = parted.demo is None and not parted.ends_with_user
    return with_system(parted.asked, system), parted.demo, silent


def _value(name: str, value: Any, column: str, columns: Columns) -> Any:
    """A rubric or messages as they are, anything else as text; None where it is missing and may
    be."""
    try:
        if columns.json and isinstance(value, float) and math.isnan(value):
            raise ConfigError("holds NaN, which is no number; write null where there is no value")
        return _checked(name, value, columns)
    except ConfigError as error:
        said_by = "" if str(error).startswith(("holds", "is")) else ":"
        raise ConfigError(f"column {column!r}{said_by} {error}") from None


def _checked(name: str, value: Any, columns: Columns) -> Any:
    if name == "rubric":
        return checked_rubric(value)
    if name == "messages":
        return read_messages(value)
    if name == "prompt":
        return _prompt(value, columns)
    if name in ("demo", "direct"):
        return _demonstration(from_cell(value) if columns.cells else value)
    if is_missing(value) and name in ("thought", "system_column"):
        return None
    text = text_of(value)
    return None if name == "system_column" and not text.strip() else text


def _prompt(value: Any, columns: Columns) -> str | list[Message]:
    """A text, or a list of messages."""
    value = from_cell(value) if columns.cells else value
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return read_messages(value)
    text = text_of(value)
    if not text.strip():
        raise ConfigError("is empty; a problem needs a prompt")
    return text


def _demonstration(value: Any) -> str | None:
    """A text, or a list with one message of the assistant's; None where it says nothing."""
    if looks_like_messages(value):
        if len(value) != 1:
            raise ConfigError(f"holds {len(value)} messages; a demonstration is one message")
        (message,) = read_messages([{"role": "user", "content": "?"}, *value])[1:]
        if message["role"] != "assistant":
            raise ConfigError(f"holds a message of the {message['role']}, not of the assistant")
        value = message["content"]
    if is_missing(value):
        return None
    text = text_of(value)
    return text if text.strip() else None

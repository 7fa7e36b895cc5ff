"""Data of a user's own that is no domain: what tables of preferences and of rows to imitate have in
common. Such a table has no verifier and no splits: every row of it is learned from.

A table that lies on this machine is read while planning, and every table again when its artifact is
made. All bad rows are told together, with file, line and column.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from posttrain.backends.prompting import readable, said
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.fingerprint import digest, file_digest, plain
from posttrain.engine.hashes import HashFile
from posttrain.engine.jsonl import write_jsonl
from posttrain.rewards.spec import NodeParts
from posttrain.suites.cells import is_missing, loaded_json, shown, spread, text_of
from posttrain.suites.checked import recall, remember
from posttrain.suites.faults import Faults
from posttrain.suites.location import CHANGED, Location, parse_location
from posttrain.suites.messages import (
    Message,
    check_system,
    fact_parts,
    from_cell,
    is_plain,
    looks_like_messages,
    message_list,
    read_messages,
    shape_facts,
    shape_of,
    with_system,
)
from posttrain.suites.records import read_records

RESPONSES = ("demo", "chosen", "rejected", "response")
"""Fields of a row that have a response, as far as it has them."""

Row = dict[str, Any]
Facts = dict[str, int]
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableKind:
    """What is done with one kind of such tables."""

    name: str
    """The verb that takes such a table in, and the kind of its stage."""
    plural: str
    """What a suite calls its part."""
    source: type[Any]
    """The class that declares such a table: `data` and the names of columns."""
    example: str
    """A place where such a table could lie."""
    file: str
    """What its artifact holds."""
    rows: Callable[[Config, Mapping[str, Any]], list[Row]]
    """What becomes of one row of the table."""
    facts: Callable[[Config, list[Row]], Facts] = lambda config, rows: {}
    """What there is to tell of all that was made, beside what every table has."""
    version: int = 1
    """Raised when rows are read in another way: what was remembered of tables then counts for
    nothing."""

    def node(
        self,
        source: Any,
        name: str,
        base_dir: Path,
        hash_file: HashFile = file_digest,
        cache: Path | None = None,
    ) -> NodeParts:
        """The parts of the graph node of a table.

        Identity are the name, the columns and the bytes (of a Hub table its reference). In
        `runtime` are "file", where it lies, and of a local table "facts". `cache` is a directory
        that remembers which tables were found good.

        Raises ConfigError for a location, a column or a row that is wrong.
        """
        where = f"{self.name} {name}"
        check_system(source, where)
        location = parse_location(source.data, base_dir, where=where)
        config = {"name": name, "table": location.text if location.path is None else location.kind}
        config |= named_columns(source)
        data: dict[str, str] = {}
        runtime: dict[str, Any] = {"file": location.text}
        if location.path is not None:
            data["table"] = location.digest(hash_file)
            memory = self._memory(config, data)
            known = recall(cache, memory)
            if known is None:
                _, known = self._read(config, location)
                remember(cache, memory, known)
            runtime |= fact_parts(known)
        return NodeParts(config=plain(config, at=where), data=data, runtime=runtime)

    def build(
        self,
        config: Config,
        runtime: Mapping[str, Any],
        out: Path,
        data: Mapping[str, str],
        cache: Path | None = None,
    ) -> Facts:
        """Write the rows into the directory `out`; the others are the parts of `node`.

        Returns rows, read (rows of the table), duplicates (those that repeat others), prompts,
        tied (rankings in which nothing is preferred, where there are any), median and longest
        (characters of prompt and response), and what `facts` adds. Raises ConfigError for a table
        that is wrong or has changed since.
        """
        where = f"{self.name} {config['name']}"
        location = parse_location(runtime["file"], Path(), where=where)
        if location.path is not None and location.digest() != data["table"]:
            raise ConfigError(f"{where}: {location.text} {CHANGED}")
        rows, facts = self._read(config, location)
        write_jsonl(out / self.file, rows)
        if data:
            # The plan before may have had no store yet.
            remember(cache, self._memory(config, data), facts)
        told: Facts = fact_parts(facts)["facts"]
        return told

    def _memory(self, config: Config, data: Mapping[str, str]) -> str:
        """The name under which the facts of a table are remembered."""
        read = {"config": dict(config), "data": dict(data), "read": [self.name, self.version]}
        return f"rows-{digest(read)[:32]}"

    def _read(self, config: Config, location: Location) -> tuple[list[Row], Facts]:
        start = f"{self.name} {config['name']}: {location.text}"
        faults = Faults(start)
        found: dict[str, Row] = {}
        num_read = duplicates = tied = 0
        for record in read_records(location, faults):
            num_read += 1
            with faults.at(record.place):
                values = record.values
                if location.kind in ("csv", "tsv"):
                    values = {column: from_cell(value) for column, value in values.items()}
                made = self.rows(config, values)
                keys = [json.dumps(row, sort_keys=True) for row in made]
                fresh = {k: row for k, row in zip(keys, made, strict=True) if k not in found}
                tied += not made
                duplicates += bool(made) and not fresh
                found |= fresh
        faults.check()
        if not found:
            raise ConfigError(f"{start} holds no row that can be learned from")
        rows = list(found.values())
        facts = {"rows": len(rows), "read": num_read, "duplicates": duplicates}
        facts["prompts"] = len({row["id"] for row in rows})
        if tied:
            facts["tied"] = tied
        sizes = (len(text) for row in rows for text in texts(row))
        asked = Counter(shape_of(row["messages"]) for row in rows if "messages" in row)
        return rows, facts | spread(sizes) | self.facts(config, rows) | shape_facts(asked)

    def texts(self, config: Config, file: str) -> list[str]:
        """What a model will read of the rows of a table that lies at `file`. Raises ConfigError for
        a table that is gone or wrong."""
        location = parse_location(file, Path(), where=f"{self.name} {config['name']}")
        return [text for row in self._read(config, location)[0] for text in texts(row)]


def check_texts(source: Any, where: str) -> None:
    """Raise ConfigError for a declaration with a field that is no text."""
    for field in fields(source):
        value = getattr(source, field.name)
        if not isinstance(value, str | None) or (value is None and field.name == "data"):
            raise ConfigError(f"{where}: {field.name} = {value!r}; it has to be a text")


def named_columns(source: Any) -> dict[str, str]:
    """Field to column, of those that are named."""
    named = {field.name: getattr(source, field.name) for field in fields(source)}
    return {name: column for name, column in named.items() if column is not None and name != "data"}


def texts(row: Row) -> list[str]:
    """All that a model reads of a row: its prompt and a response, once for each response."""
    asked = [said(message) for message in row["messages"]] if "messages" in row else [row["prompt"]]
    return ["\n".join([*asked, row[field]]) for field in RESPONSES if field in row]


# -- one row; every ConfigError is told with the row's place ---------------------------------------


def cell(record: Mapping[str, Any], field: str, column: str) -> Any:
    """The value of the column that stands for a field. Raises ConfigError where there is none."""
    if column not in record:
        raise ConfigError(
            f"column {column!r} is missing; {choices_text(column, record, label='columns there')}; "
            f'name the right one with {field} = "..."'
        )
    if is_missing(record[column]):
        raise ConfigError(f"column {column!r} holds no value; fill it, or leave the row out")
    return record[column]


def number(record: Mapping[str, Any], field: str, column: str) -> float:
    """A finite number of a column."""
    return as_number(cell(record, field, column), f"column {column!r}")


def as_number(value: Any, place: str) -> float:
    """The value as a finite number, also where it is a text."""
    if is_missing(value):
        raise ConfigError(f"{place} holds no value; it has to be a number")
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{place} holds {shown(value)}; it has to be a number")
    return found


def text(value: Any, place: str) -> str:
    """A text that is not blank; a number becomes one."""
    try:
        found = text_of(value)
    except ConfigError as error:
        raise ConfigError(f"{place} {error}") from None
    if not found.strip():
        raise ConfigError(f"{place} is empty; fill it, or leave the row out")
    return found


def read_json(value: Any, place: str, hint: str) -> Any:
    """What a JSON text says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return loaded_json(value, hint=hint)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


TURN = re.compile(r"(?:^|\n)\n(Human|Assistant):[ \t]*")
"""What begins a turn of a transcript."""


def transcript(value: Any) -> Any:
    """The messages of a transcript as HH-RLHF writes them (arXiv 2204.05862), whose first turn is
    Human's; anything else as it is."""
    if not isinstance(value, str) or not re.match(r"\s*Human:", value):
        return value
    _, *parts = TURN.split("\n\n" + value.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in pairs]


def response(value: Any, place: str) -> tuple[list[Message], str]:
    """A response that is given as a text or as messages: the messages before it, if the whole
    conversation is given, and its text."""
    if not looks_like_messages(value):
        return [], text(value, place)
    try:
        *before, last = message_list(value)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    if last["role"] != "assistant":
        raise ConfigError(
            f"{place}: its last message is one of the role {last['role']!r}; a response is a "
            "message of the role 'assistant'"
        )
    if last.get("tool_calls"):
        raise ConfigError(
            f"{place}: its last message calls tools; a response to learn is a text, so leave the "
            "row out"
        )
    return before, text(last["content"], f"{place}: its last message")


def asked_for(config: Config, record: Mapping[str, Any], prompt: Any, place: str) -> Row:
    """The beginning of a row: an id that is the same for the same prompt, `prompt`, and `messages`
    where the model is shown more than one plain message of a user."""
    if looks_like_messages(prompt):
        try:
            messages = read_messages(prompt)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    else:
        messages = [{"role": "user", "content": text(prompt, place)}]
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"{place} ends with a message of the role 'assistant'; a prompt ends before the "
            "response, with what the model is to answer"
        )
    messages = with_system(messages, _system(config, record))
    row: Row = {"id": "", "domain": config["name"], "prompt": readable(messages)}
    key = row["prompt"]
    if not is_plain(messages):
        row["messages"] = messages
        key = json.dumps(messages, sort_keys=True)
    row["id"] = f"{config['name']}-{hashlib.sha256(key.encode('utf-8')).hexdigest()[:12]}"
    return row


def _system(config: Config, record: Mapping[str, Any]) -> str | None:
    """The system message of a row: the same for all, or that of a column; an empty cell is none."""
    column = config.get("system_column")
    if column is None:
        return config.get("system")
    found = None if is_missing(record.get(column, "")) else cell(record, "system_column", column)
    said = "" if found is None else text_of(found)
    return said if said.strip() else None
